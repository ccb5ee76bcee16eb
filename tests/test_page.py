"""The page in headless Chromium, over a real server on a tiny index whose captions, keys and metadata are hostile."""

import base64
import io
import os
import re
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import tiny
from PIL import Image

import retrieval
from clip_train.embed import embed
from clip_train.fit import FitConfig
from clip_train.shards import write_shards
from diffusion.decoder import DecoderConfig
from diffusion.generate import Generator
from diffusion.prior import PriorConfig
from diffusion.provenance import read_provenance
from diffusion.train_decoder import train_decoder
from diffusion.train_prior import train_prior
from retrieval.index import build_index
from retrieval.query import parse_algebra
from retrieval.search import Searcher

driver = pytest.importorskip("playwright.sync_api", reason="the page is tested with playwright: pip install playwright")
for needed in ("fastapi", "uvicorn", "prometheus_client", "python_multipart"):
    pytest.importorskip(needed, reason=f"the page needs a server, and that {needed}: pip install 'unclip[serve]'")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = os.environ.get("UNCLIP_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
if CHROMIUM is None:
    pytest.skip("no Chromium on the PATH; install one, or name it in UNCLIP_CHROMIUM", allow_module_level=True)

QUIETLY = """--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --disable-dev-shm-usage""".split()
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 320, "height": 640}
PAGE = Path(retrieval.__file__).parent / "page"
ROWS = 50
ATTACK = '<img src=x onerror="window.hacked = 1"></script><script>window.hacked = 2</script>'
FEW = FitConfig(steps=1, batch_size=4, precision="fp32")
DECODER = DecoderConfig(image_size=8, widths=(16, 32), blocks=(1, 1), attention=(2,), head_width=16, cond_width=32)

expect = driver.expect
expect.set_options(timeout=20_000)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The address of a server over 50 pictures, which it has under two names, and an untrained generator."""
    import uvicorn

    from retrieval.server import ServeConfig, create_app, listen

    root = tmp_path_factory.mktemp("site")
    samples = tiny.samples(ROWS)
    meta = {f"<b onclick={ATTACK}>": ATTACK, "page": "javascript:window.hacked=3", "deep": {ATTACK: [ATTACK]}}
    samples[3] = replace(samples[3], key="<img src=x>", captions=[ATTACK, f"also {ATTACK}"], meta={"width": 20, **meta})
    write_shards(samples, root / "shards", samples_per_shard=30)
    tiny.clip(root / "clip")
    embed(root / "shards", root / "clip", root / "emb")
    build_index(root / "emb", root / "index")
    train_prior(root / "emb", root / "prior", PriorConfig(width=32, depth=1, heads=2), FEW, device="cpu")
    train_decoder(root / "shards", root / "clip", root / "decoder", DECODER, FEW, device="cpu")

    config = ServeConfig(port=0)
    generator = Generator.open(root / "decoder", root / "prior")
    searcher = Searcher.open(root / "index")
    app = create_app({"tiny": searcher, "again": searcher}, generator=generator, config=config)
    sock, server = listen(config), uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def browser(site):
    """Chromium. Tabs share a process and a cache, which is fast; what the page remembers is the tab's own."""
    with driver.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=[*QUIETLY, "--process-per-site"])
        yield browser.new_context(viewport=DESKTOP, base_url=site, reduced_motion="reduce")
        browser.close()


@pytest.fixture
def page(browser, site):
    """A tab of its own. Fails the test if the page asks another server, breaks its policy or throws."""
    page, wrong = browser.new_page(), []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda line: "Security Policy" in line.text and wrong.append(line.text))
    page.on("request", lambda request: request.url.startswith((site, "blob:", "data:")) or wrong.append(request.url))
    yield page
    page.unroute_all(behavior="ignoreErrors")
    page.close()
    assert wrong == []


def visit(page, query: str = ""):
    """Open the page with a query in its address, and wait until it is ready for people."""
    page.goto(f"/{query}")
    expect(page.locator("html[data-ready]")).to_be_attached()
    if query:
        expect(page.locator("#results")).not_to_have_attribute("aria-busy", "true")
    return page


def asked(page, act) -> dict:
    """The search that act() makes the page ask for."""
    with page.expect_request("**/api/search") as request, page.expect_response("**/api/search"):
        act()
    return request.value.post_data_json


def tiles(page):
    return page.locator("#grid .tile")


def captions(page) -> list[str]:
    return page.locator("#grid .caption").all_inner_texts()


def in_address(page) -> dict[str, list[str]]:
    return parse_qs(urlsplit(page.url).fragment)


def open_result(page, nth: int) -> None:
    tiles(page).nth(nth).click()
    expect(page.locator("#details .rest")).to_have_attribute("aria-busy", "false")


def test_one_begins_with_what_the_page_can_do_and_with_captions_of_the_index_to_try(page):
    visit(page)
    expect(page.locator("#start h2")).to_have_text("Search 50 pictures by what they show")
    example = page.locator("#start .tile").first
    words = example.locator(".caption").inner_text()
    assert asked(page, example.click)["terms"] == [{"kind": "text", "value": words, "weight": 1}]
    expect(tiles(page)).to_have_count(40)
    expect(page.locator("#start")).to_be_hidden()
    assert page.title().startswith(words)


def test_words_find_pictures_and_a_result_shows_all_that_is_known_of_it(page):
    visit(page).fill("#words", "picture number 7")
    body = asked(page, lambda: page.press("#words", "Enter"))
    assert body == {
        "index": None, "terms": [{"kind": "text", "value": "picture number 7", "weight": 1}],
        "k": 40, "modality": "image", "where": None, "distinct": None,
    }  # fmt: skip
    expect(page.locator("#status")).to_contain_text("40 of 50, best first")
    expect(tiles(page).first.locator(".score")).to_have_text(re.compile(r"^[−\d].*"))
    open_result(page, 0)
    details = page.locator("#details")
    expect(details.locator("h2")).to_have_text(captions(page)[0])
    for text in ("Also said of it", "one of many", "Metadata", "label", "Provenance", "sha256:"):
        expect(details).to_contain_text(text)
    assert details.locator("img").evaluate("img => img.decode().then(() => img.naturalWidth)") == 20  # as in the tar


def test_the_score_is_a_probability_where_the_server_knows_one(page):
    def calibrated(route):
        answer = route.fetch().json()
        for hit, probability in zip(answer["hits"], (0.999, 0.873, 0.001, None), strict=False):
            hit["probability"] = probability
        route.fulfill(json=answer)

    page.route("**/api/search", calibrated)
    visit(page, "#q=one")
    scores = page.locator("#grid .score")
    expect(scores.nth(3)).to_have_text(re.compile(r"^[−\d]+\.\d{3}$"))
    assert scores.all_inner_texts()[:3] == ["> 99 %", "87 %", "< 1 %"]
    expect(page.locator("#status")).to_contain_text("how likely words and picture match")
    open_result(page, 1)
    expect(page.locator("#details")).to_contain_text("87 % likely to match (cosine")


def test_a_picture_that_is_gone_leaves_its_words(page):
    page.route("**/api/picture/**", lambda route: route.fulfill(status=404, json={}))
    visit(page, "#q=one")
    expect(page.locator("#grid .mat.gone").first).to_be_visible()  # after it was asked for once more
    assert captions(page)[0] != ""


def test_a_result_is_searched_from_added_and_taken_away(page):
    visit(page, "#q=picture+number+7")
    open_result(page, 1)
    body = asked(page, page.get_by_role("button", name="take away").last.click)
    key = body["terms"][1]["value"]
    assert body["terms"][1] == {"kind": "key", "value": key, "weight": -1}
    expect(page.locator(".chip.minus img")).to_be_visible()
    open_result(page, 0)
    body = asked(page, page.get_by_role("button", name="Search from this").click)
    assert [(term["kind"], term["weight"]) for term in body["terms"]] == [("key", 1)]
    expect(tiles(page).first.locator(".score")).to_have_text("1.000")  # nothing is nearer to it than itself


def test_signs_between_ideas_make_chips_whose_weights_reach_the_server(page):
    visit(page).fill("#words", "red-hot king - man + woman")
    body = asked(page, lambda: page.press("#words", "Enter"))
    assert [(term["value"], term["weight"]) for term in body["terms"]] == [
        ("red-hot king", 1), ("man", -1), ("woman", 1)
    ]  # fmt: skip
    expect(page.locator("#words")).to_have_value("red-hot king")
    weight = page.get_by_role("slider", name="Weight of man")
    assert asked(page, lambda: weight.fill("0.5"))["terms"][1]["weight"] == -0.5
    assert asked(page, page.locator(".chip .sign").first.click)["terms"][1]["weight"] == 0.5
    assert len(asked(page, page.get_by_role("button", name="Remove woman").click)["terms"]) == 2
    page.fill("#idea", "a hat")
    assert asked(page, page.locator("#idea-minus").click)["terms"][2] == dict(kind="text", value="a hat", weight=-1)
    page.fill("#words", '"man - woman"')
    assert asked(page, lambda: page.press("#words", "Enter"))["terms"][0]["value"] == "man - woman"


SUMS = [
    "a red fox", "king - man + woman", "fox - 0.5*cartoon + 2 * red", "- red", "+ a - b", "t-shirt", "-5 degrees",
    "C++ - old", "a fox -", "woman – red", "king − man", '"t-shirt - red"', '"t-shirt - red" - "blue"', "漢 - é",
    '"a - b" - c', 'a - 0.5*"2*4 board"', '"0.5*cat"', "2*4 board", ".5*x", '5" screen - red', '"a" "b" - c d',
    '- "key:x"', "a\t-\tb", "  a  +  b  ", "time: 3 o'clock", "a-b - c - d", "2 * fox", "1.*x - .25*y",
]  # fmt: skip


def test_the_page_reads_a_sum_as_the_command_line_does(page):
    visit(page)
    read = "async (all) => { const { terms } = await import('./query.js'); return all.map((typed) => terms(typed)); }"
    for typed, said in zip(SUMS, page.evaluate(read, SUMS), strict=True):
        expected = [(term.value, term.weight) for term in parse_algebra(typed)]
        assert [tuple(term) for term in said] == expected, typed


def test_words_in_quotes_stay_one_text_however_often_they_are_searched(page):
    visit(page).fill("#words", '"t-shirt - red" - "blue"')
    body = asked(page, lambda: page.press("#words", "Enter"))
    assert [(term["value"], term["weight"]) for term in body["terms"]] == [("t-shirt - red", 1), ("blue", -1)]
    expect(page.locator("#words")).to_have_value('"t-shirt - red"')
    assert [term["value"] for term in asked(page, lambda: page.press("#words", "Enter"))["terms"]] == [
        "t-shirt - red", "blue"
    ]  # fmt: skip
    page.fill("#idea", "3*red")
    assert asked(page, page.locator("#idea-minus").click)["terms"][2]["weight"] == -3
    assert asked(page, page.reload)["terms"][2]["weight"] == -3


PUT = """(where, [type, file, on]) => {
    const bytes = Uint8Array.from(atob(file), letter => letter.charCodeAt(0)), data = new DataTransfer();
    data.items.add(new File([bytes], "mine.png", {type: "image/png"}));
    const how = {bubbles: true, cancelable: true};
    if (type === "paste") return where.dispatchEvent(new ClipboardEvent(type, {...how, clipboardData: data}));
    where.dispatchEvent(new DragEvent("dragover", {...how, dataTransfer: data}));
    document.querySelector(on).dispatchEvent(new DragEvent(type, {...how, dataTransfer: data}));
}"""


def test_a_picture_that_is_chosen_pasted_or_dropped_finds_itself(page):
    visit(page)

    def put(how: str, number: int, on: str = "[data-drop=new]"):
        file = base64.b64encode(tiny.picture(number)).decode()
        page.locator("body").evaluate(PUT, [how, file, on])

    choose = {"name": "mine.png", "mimeType": "image/png", "buffer": tiny.picture(5)}
    ways = [
        (5, lambda: page.set_input_files("#file", choose)),
        (6, lambda: put("paste", 6)),
        (7, lambda: put("drop", 7)),
    ]
    for number, way in ways:
        body = asked(page, way)
        assert base64.b64decode(body["terms"][0]["value"]) == tiny.picture(number) and len(body["terms"]) == 1
        expect(tiles(page).first.locator(".caption")).to_have_text(f"picture number {number}")
    body = asked(page, lambda: put("drop", 8, "[data-drop=add]"))
    assert [term["kind"] for term in body["terms"]] == ["image", "image"]
    expect(page.locator("#drop")).to_be_hidden()
    page.go_back()  # to the picture alone, which the tab still has
    expect(page.locator(".chip")).to_have_count(1)


def test_a_picture_that_a_reload_forgot_is_never_taken_for_a_later_one(page):
    def chosen(number: int) -> dict:
        return {"name": f"{number}.png", "mimeType": "image/png", "buffer": tiny.picture(number)}

    visit(page)
    asked(page, lambda: page.set_input_files("#file", chosen(5)))
    page.reload()
    expect(page.locator("html[data-ready]")).to_be_attached()
    expect(page.locator(".chip")).to_have_count(0)  # the tab has no bytes of it any more
    asked(page, lambda: page.set_input_files("#file", chosen(6)))
    page.go_back()  # to the step that had the first
    expect(page.locator("#start")).to_be_visible()
    expect(page.locator(".chip")).to_have_count(0)


def test_a_large_picture_is_made_smaller_and_a_file_that_is_none_is_refused_in_words(page):
    visit(page)
    file = io.BytesIO()
    Image.new("RGB", (3000, 1500), "teal").save(file, "JPEG")
    large = {"name": "large.jpg", "mimeType": "image/jpeg", "buffer": file.getvalue()}
    body = asked(page, lambda: page.set_input_files("#file", large))
    assert Image.open(io.BytesIO(base64.b64decode(body["terms"][0]["value"]))).size == (1024, 512)
    page.set_input_files("#file", {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"no picture"})
    expect(page.locator("#error")).to_have_text("notes.txt is not a picture that this browser can read.")


def test_hostile_captions_keys_and_metadata_stay_text(page):
    visit(page, "#q=%3Cimg+src%3Dx%3E+-+%3Cb%3E")
    visit(page, "#key=1~%3Cimg+src%3Dx%3E&text=-0.1~" + "%3Cscript%3Ewindow.hacked=4%3C/script%3E")
    expect(tiles(page).first.locator(".caption")).to_have_text(ATTACK)
    expect(page.locator(".chip .label").first).to_have_text(ATTACK)
    assert page.title().startswith(ATTACK)
    open_result(page, 0)
    details = page.locator("#details")
    expect(details.locator("h2")).to_have_text(ATTACK)
    for text in (f"also {ATTACK}", f"<b onclick={ATTACK}>", "<img src=x>", "javascript:window.hacked=3"):
        expect(details.get_by_text(text, exact=True).first).to_be_visible()
    assert details.locator("a").count() == 0  # a link with another scheme than http is no link
    page.locator("#filter-toggle").click()
    expect(page.locator("#columns")).to_contain_text("<b onclick=")
    assert page.locator("img[src=x], [onerror], [onclick]").count() == 0
    assert page.evaluate("window.hacked") is None


def test_the_policy_lets_no_markup_no_inline_code_and_no_other_server_through(browser, site):
    page = browser.new_page()
    header = page.request.get(site).headers["content-security-policy"]
    html = (PAGE / "index.html").read_text(encoding="utf-8")
    assert "unsafe" not in header + html and "http:" not in header and "*" not in header
    assert not re.search(r"<script(?![^>]*\ssrc=)|\sstyle=|\son\w+=|<style|https?://", html)
    for source in [*PAGE.glob("*.js"), *PAGE.glob("*.css")]:
        text = source.read_text(encoding="utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|@import|url[(]", text)
    visit(page)
    assert page.evaluate("() => { try { document.body.innerHTML = '<p>'; } catch (error) { return error.name; } }")
    with page.expect_console_message(lambda line: "Content Security Policy" in line.text):
        page.evaluate("fetch('https://elsewhere.invalid/').catch(error => error.name)")
    page.close()


def test_the_address_holds_the_query_and_back_undoes_a_step(page):
    visit(page).fill("#words", "one")
    asked(page, lambda: page.press("#words", "Enter"))
    page.fill("#idea", "- two~2 & more")
    asked(page, lambda: page.press("#idea", "Enter"))
    asked(page, page.get_by_text("by captions").click)
    asked(page, page.get_by_text("hide near-duplicates").click)
    address = in_address(page)
    assert address == {"q": ["one"], "text": ["-1~two~2 & more"], "by": ["text"], "distinct": ["1"]}
    body = asked(page, page.reload)
    assert [(term["value"], term["weight"]) for term in body["terms"]] == [("one", 1), ("two~2 & more", -1)]
    assert body["modality"] == "text" and body["distinct"] == 0.95
    expect(page.get_by_role("switch", name="hide near-duplicates")).to_be_checked()
    assert asked(page, page.go_back)["distinct"] is None
    assert asked(page, page.go_back)["modality"] == "image"
    assert len(asked(page, page.go_back)["terms"]) == 1
    page.go_back()
    expect(page.locator("#start")).to_be_visible()
    expect(tiles(page)).to_have_count(0)


def test_another_index_is_asked_and_stays_in_the_address(page):
    visit(page, "#q=one&key=1~s001")
    expect(page.locator("#index")).to_have_value("tiny")
    body = asked(page, lambda: page.get_by_label("Index").select_option("again"))
    assert body["index"] == "again" and len(body["terms"]) == 1  # keys of the other index mean nothing here
    assert in_address(page) == {"q": ["one"], "index": ["again"]}
    assert asked(page, page.reload)["index"] == "again"
    asked(page, lambda: visit(page, "#q=one&index=gone"))
    expect(page.locator("#error")).to_contain_text("There is no index 'gone' here")


def test_an_opened_result_is_in_the_address_and_back_closes_it(page):
    visit(page, "#q=one")
    open_result(page, 2)
    row = tiles(page).nth(2).get_attribute("data-row")
    (place,) = in_address(page)["row"]
    assert place.split("~")[0] == row
    page.reload()
    expect(tiles(page)).to_have_count(40)
    expect(page.locator("#details h2")).to_have_text(captions(page)[2])
    visit(page, "#q=one")
    open_result(page, 0)
    page.go_back()
    expect(page.locator("#details")).to_be_hidden()
    expect(tiles(page)).to_have_count(40)


def test_rows_are_asked_for_with_their_keys_which_a_compaction_does_not_change(page):
    visit(page)
    with page.expect_request("**/api/picture/**") as small:
        asked(page, lambda: (page.fill("#words", "picture number 7"), page.press("#words", "Enter")))
    assert re.fullmatch(r".*/api/picture/tiny/\d+\?side=\d+&key=s\d{3}", small.value.url)
    large = re.compile(r"/api/picture/tiny/\d+\?key=")
    with page.expect_request("**/api/details/**") as details, page.expect_request(large) as picture:
        open_result(page, 0)
    query = parse_qs(urlsplit(details.value.url).query)
    assert query == parse_qs(urlsplit(picture.value.url).query)
    (place,) = in_address(page)["row"]
    assert place.split("~")[1] == query["key"][0]
    caption = page.locator("#details h2").inner_text()
    # the rows have other numbers now, as after a compaction: the link still shows its sample
    row, key = place.split("~")
    visit(page, f"#q=one&row={(int(row) + 1) % ROWS}~{key}")
    expect(page.locator("#details h2")).to_have_text(caption)
    expect(page.locator("#details .record").first).to_contain_text(key)
    visit(page, f"#row={row}")  # a link without a key is of the row
    expect(page.locator("#details h2")).to_have_text(caption)


def test_the_page_is_used_by_keyboard(page):
    visit(page)
    page.keyboard.press("/")
    expect(page.locator("#words")).to_be_focused()
    page.keyboard.type("one")
    asked(page, lambda: page.keyboard.press("Enter"))
    for _ in range(30):  # Tab reaches the results, and they are one stop
        if page.evaluate("document.activeElement.classList.contains('tile')"):
            break
        page.keyboard.press("Tab")
    expect(tiles(page).nth(0)).to_be_focused()
    assert page.locator("#grid .tile[tabindex='0']").count() == 1
    outline = tiles(page).nth(0).evaluate("tile => getComputedStyle(tile).outlineStyle")
    assert outline == "solid"
    across = page.evaluate(
        "() => { const all = [...document.querySelectorAll('#grid .tile')];"
        " return all.findIndex(tile => tile.offsetTop !== all[0].offsetTop); }"
    )
    for key, at in [("ArrowRight", 1), ("ArrowDown", across + 1), ("ArrowLeft", across), ("ArrowUp", 0), ("End", 39)]:
        page.keyboard.press(key)
        expect(tiles(page).nth(at)).to_be_focused()
    page.keyboard.press("Home")
    page.keyboard.press("Enter")
    expect(page.locator("#details")).to_be_visible()
    assert page.evaluate("document.querySelector('#details').contains(document.activeElement)")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#details h2")).to_have_text(captions(page)[1])
    page.keyboard.press("Escape")
    expect(page.locator("#details")).to_be_hidden()
    expect(tiles(page).nth(1)).to_be_focused()
    assert asked(page, lambda: page.keyboard.press("-"))["terms"][1]["weight"] == -1


def test_a_filter_is_offered_applied_and_its_error_shown_beside_it(page):
    visit(page, "#q=one")
    page.locator("#filter-toggle").click()
    page.locator("#columns button", has_text=re.compile("^label")).click()
    page.keyboard.type("label 3")
    assert asked(page, lambda: page.keyboard.press("Enter"))["where"] == "label == 'label 3'"
    expect(tiles(page)).to_have_count(2)
    page.fill("#where", "lable == 'label 3'")
    asked(page, lambda: page.press("#where", "Enter"))
    expect(page.locator("#where-error")).to_contain_text("lable")
    expect(page.locator("#where")).to_have_attribute("aria-invalid", "true")
    expect(page.locator("#error")).to_be_hidden()
    asked(page, page.get_by_role("button", name="Clear").click)
    expect(tiles(page)).to_have_count(40)
    expect(page.locator("#where-error")).to_be_hidden()


def test_a_column_named_like_a_word_of_the_language_is_offered_in_backticks(page):
    def renamed(route):
        info = route.fetch().json()
        info["indexes"][0]["columns"] = {"not": "number", "In": "text", "Null.x": "number", "inner": "number"}
        route.fulfill(json=info)

    page.route("**/api/info", renamed)
    visit(page)
    page.locator("#filter-toggle").click()
    expect(page.locator("#where-example")).to_have_text(", as in inner >= 64")
    for name, put in {"not": "`not` >= ", "In": "`In` == ''", "Null.x": "`Null.x` >= ", "inner": "inner >= "}.items():
        page.fill("#where", "")
        page.locator("#columns button", has_text=re.compile(f"^{re.escape(name)}")).click()
        expect(page.locator("#where")).to_have_value(put)


def test_the_samples_to_begin_with_come_from_all_numbers_that_rows_have(page):
    def deleted(route):
        info = route.fetch().json()
        info["indexes"][0] |= {"rows": 1, "numbers": ROWS}
        route.fulfill(json=info)

    page.route("**/api/info", deleted)
    visit(page)
    expect(page.locator("#start .tile")).to_have_count(12)


def test_a_generator_without_a_prior_offers_no_pictures_of_words(page):
    def unprompted(route):
        info = route.fetch().json()
        info["generator"]["prompts"] = False
        route.fulfill(json=info)

    page.route("**/api/info", unprompted)
    visit(page, "#q=one")
    page.locator("#studio-toggle").click()
    modes = page.locator("#studio .segments label")
    assert modes.all_inner_texts() == ["vary", "between two", "edit"]
    expect(page.get_by_role("button", name="Generate", exact=True)).to_be_disabled()
    expect(page.locator("#start")).not_to_contain_text("Generate from words")


def test_more_results_join_those_that_are_there(page):
    visit(page, "#q=one")
    first = tiles(page).first.element_handle()
    before = captions(page)
    page.get_by_role("button", name="Show more").focus()
    assert asked(page, lambda: page.keyboard.press("Enter"))["k"] == 80
    expect(tiles(page)).to_have_count(50)
    assert captions(page)[:40] == before and first.evaluate("tile => tile.isConnected")
    expect(tiles(page).nth(40)).to_be_focused()
    expect(page.get_by_role("button", name="Show more")).to_be_hidden()


def test_a_newer_search_overtakes_the_one_under_way(page):
    visit(page, "#q=one")
    held = []
    page.route("**/api/search", lambda route: held.append(route), times=1)
    page.fill("#words", "slow")
    page.press("#words", "Enter")
    expect(page.locator("#results")).to_have_attribute("aria-busy", "true")
    page.fill("#words", "picture number 9")
    with page.expect_event("requestfailed") as failed:
        asked(page, lambda: page.press("#words", "Enter"))
    assert failed.value.post_data_json["terms"][0]["value"] == "slow"
    expect(page.locator("#results")).to_have_attribute("aria-busy", "false")
    expect(page.locator("#error")).to_be_hidden()
    assert in_address(page)["q"] == ["picture number 9"] and len(held) == 1


def test_a_server_that_is_full_or_gone_is_said_in_words_and_asked_again(page):
    visit(page)
    busy = {"status": 429, "headers": {"Retry-After": "3"}, "json": {"error": {"message": "full"}}}
    page.route("**/api/search", lambda route: route.fulfill(**busy), times=1)
    page.fill("#words", "one")
    asked(page, lambda: page.press("#words", "Enter"))
    said = page.get_by_role("alert").filter(visible=True)
    expect(said).to_contain_text("The server has as much to do as it can take. Try again in 3 s.")
    page.route("**/api/search", lambda route: route.abort(), times=1)
    page.get_by_role("button", name="Try again").click()
    expect(said).to_contain_text("The server does not answer. Is it still running?")
    asked(page, page.get_by_role("button", name="Try again").click)
    expect(tiles(page)).to_have_count(40)
    expect(said).to_have_count(0)


def test_a_token_is_asked_for_kept_for_the_tab_and_sent_for_pictures_too(page):
    def guard(route):
        if route.request.headers.get("authorization") == "Bearer sesame open":
            return route.continue_()
        return route.fulfill(status=401, json={"error": {"message": "a token is needed"}})

    page.route("**/api/**", guard)
    page.goto("/#q=one")
    page.locator("#token-value").fill("wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#token-note")).to_contain_text("does not know that token")
    page.locator("#token-value").fill("sesame open")
    page.keyboard.press("Enter")
    expect(tiles(page)).to_have_count(40)
    expect(tiles(page).first.locator("img")).to_have_attribute("src", re.compile("^blob:"))
    assert tiles(page).first.locator("img").evaluate("img => img.decode().then(() => img.naturalWidth)") > 0
    asked(page, page.reload)
    expect(tiles(page)).to_have_count(40)
    expect(page.locator("#token")).to_be_hidden()


def test_pictures_are_made_of_words_with_a_strip_and_can_be_kept_and_searched_from(page, tmp_path):
    visit(page, "#q=picture+number+4")
    page.locator("#studio-toggle").click()
    expect(page.get_by_label("Prompt")).to_have_value("picture number 4")
    page.get_by_label("steps", exact=True).fill("2")
    page.get_by_label("pictures", exact=True).fill("2")
    page.get_by_label("guidance").fill("1.5")
    page.get_by_label("seed", exact=True).fill("7")
    page.get_by_label("show the steps").check()
    with page.expect_request("**/api/generate") as request:
        page.get_by_role("button", name="Generate", exact=True).click()
    body = request.value.post_data_json
    assert body == {
        "mode": "generate", "prompt": "picture number 4", "text": None, "from": None,
        "count": 2, "seed": 7, "steps": 2, "guidance": 1.5, "strip": True,
    }  # fmt: skip
    works = page.locator(".work")
    expect(works).to_have_count(2)
    assert page.locator(".strip img").count() >= 2
    works.first.locator("summary").click()
    expect(works.first.locator(".record").first).to_contain_text("picture number 4")
    with page.expect_download() as download:
        works.first.get_by_role("link", name="Download").click()
    assert download.value.suggested_filename == "unclip-picture-number-4-7.png"
    download.value.save_as(tmp_path / "made.png")
    assert read_provenance(tmp_path / "made.png")["seed"] == 7
    body = asked(page, works.first.get_by_role("button", name="Search").click)
    assert base64.b64decode(body["terms"][0]["value"]) == (tmp_path / "made.png").read_bytes()


def test_results_are_varied_interpolated_and_edited(page):
    visit(page, "#q=one")
    page.locator("#studio-toggle").click()
    page.get_by_label("steps", exact=True).fill("2")
    page.get_by_label("pictures", exact=True).fill("3")
    rows = [int(tiles(page).nth(i).get_attribute("data-row")) for i in (0, 2)]

    def made(act) -> dict:
        with page.expect_request("**/api/generate") as request:
            act()
        expect(page.locator("#studio")).to_have_attribute("aria-busy", "false")
        return request.value.post_data_json

    open_result(page, 0)
    body = made(page.get_by_role("button", name="Vary").click)
    (key,) = parse_qs(urlsplit(tiles(page).nth(0).locator("img").get_attribute("src")).query)["key"]
    assert (body["mode"], body["from"]) == ("vary", [{"index": "tiny", "row": rows[0], "key": key}])
    expect(page.locator(".work")).to_have_count(3)
    page.get_by_role("button", name="Interpolate").click()
    expect(page.locator("#details .said")).to_contain_text("is one end")
    open_result(page, 2)
    body = made(page.get_by_role("button", name="Interpolate with").click)
    assert (body["mode"], [one["row"] for one in body["from"]]) == ("interpolate", rows)
    page.get_by_role("button", name="Edit by words").click()
    expect(page.get_by_label("Towards")).to_be_focused()
    page.keyboard.type("blue")
    body = made(lambda: page.keyboard.press("Enter"))
    assert (body["mode"], body["text"], body["from"][0]["row"]) == ("edit", "blue", rows[1])
    expect(page.locator(".work")).to_have_count(1)


def test_generating_can_be_stopped_and_a_full_queue_is_said(page):
    visit(page, "#q=one")
    page.locator("#studio-toggle").click()
    page.route("**/api/generate", lambda route: None, times=1)  # never answered
    page.get_by_role("button", name="Generate", exact=True).click()
    expect(page.locator("#studio")).to_have_attribute("aria-busy", "true")
    with page.expect_event("requestfailed"):
        page.get_by_role("button", name="Stop").click()
    expect(page.locator("#studio .status")).to_have_text("Stopped.")
    page.route("**/api/generate", lambda route: route.fulfill(status=429, json={}), times=1)
    page.get_by_role("button", name="Generate", exact=True).click()
    expect(page.locator("#studio .notice")).to_contain_text("Try again in a moment.")


def test_nothing_is_wider_than_a_phone_of_320_pixels(page):
    page.set_viewport_size(PHONE)

    def fits():
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]

    fits_at = visit(page)
    expect(fits_at.locator("#start .tile").first).to_be_visible()
    fits()
    visit(page, "#q=a+word&text=-1~a+rather+long+idea+that+goes+on+and+on&key=0.5~s005&where=width+%3D%3D+20")
    expect(tiles(page)).to_have_count(40)
    page.locator("#studio-toggle").click()
    fits()
    open_result(page, 0)
    assert page.locator("#details").evaluate("dialog => dialog.matches(':modal')")
    fits()
    assert page.locator("#details").evaluate("dialog => dialog.scrollWidth <= innerWidth")
    page.keyboard.press("Escape")
    expect(page.locator("#details")).to_be_hidden()
    expect(tiles(page).first).to_be_focused()
