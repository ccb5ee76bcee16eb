// Scores in words: a probability where the CLIP is calibrated, else a cosine.

/** "87 %" or ".312" */
export function short({ probability, score }) {
  if (probability === null || probability === undefined) return cosine(score);
  if (probability > 0.995) return "> 99 %";
  if (probability < 0.005) return "< 1 %";
  return `${Math.round(100 * probability)} %`;
}

/** "87 % likely to match; cosine 0.312" */
export function long(hit) {
  const { probability, score } = hit;
  if (score === undefined || score === null) return "";
  if (probability === null || probability === undefined) return `cosine ${cosine(score)}`;
  return `${short(hit)} likely to match (cosine ${cosine(score)})`;
}

const cosine = (score) => Number(score).toFixed(3).replace("-", "−");
