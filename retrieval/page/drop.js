// Pictures that people bring: chosen as files, pasted, or dropped on the page.

import { find } from "./element.js";

/** take(file, fresh): search from the picture (fresh), or add it to the query. hasQuery(): whether there is one. */
export function takePictures(take, hasQuery) {
  choosing(take);
  document.addEventListener("paste", (event) => {
    const pasted = [...(event.clipboardData?.files ?? [])].find(({ type }) => type.startsWith("image/"));
    if (!pasted) return;
    event.preventDefault();
    take(pasted, document.activeElement !== find("idea"));
  });
  dropping(take, hasQuery);
}

function choosing(take) {
  const file = find("file");
  let fresh = true;
  const ask = (anew) => () => {
    fresh = anew;
    file.value = ""; // so that the same file can be chosen again
    file.click();
  };
  find("choose").addEventListener("click", ask(true));
  find("idea-picture").addEventListener("click", ask(false));
  file.addEventListener("change", () => file.files[0] && take(file.files[0], fresh));
}

/** While a file is dragged over the page it shows where to drop it; with a query, there are two places. */
function dropping(take, hasQuery) {
  const drop = find("drop");
  const holdsFile = (event) => event.dataTransfer?.types.includes("Files");
  const place = ({ target }) => target.closest?.("[data-drop]");
  document.addEventListener("dragover", (event) => {
    if (!holdsFile(event)) return;
    event.preventDefault();
    drop.hidden = false;
    drop.querySelector("[data-drop=add]").hidden = !hasQuery();
    for (const part of drop.children) part.classList.toggle("over", part === place(event));
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) drop.hidden = true;
  });
  document.addEventListener("drop", (event) => {
    if (!holdsFile(event)) return;
    event.preventDefault();
    drop.hidden = true;
    const dropped = event.dataTransfer.files[0];
    if (dropped) take(dropped, place(event)?.dataset.drop !== "add");
  });
}
