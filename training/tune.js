"use strict";
// Draws heat maps and masks from the scores embedded in the page, and draws the masks again when the slider moves.
(() => {
  const [colours, curves, reach] = JSON.parse(document.getElementById("facts").textContent);
  const slider = document.getElementById("score");
  const OPAQUE = 255;

  // The upper half of the embedded picture holds the score of the strongest class, the lower half the class.
  function read(picture, half, width, height, smooth) {
    const canvas = Object.assign(document.createElement("canvas"), { width, height });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.imageSmoothingEnabled = smooth;
    const rows = picture.naturalHeight / 2;
    context.drawImage(picture, 0, half * rows, picture.naturalWidth, rows, 0, 0, width, height);
    return context.getImageData(0, 0, width, height).data;
  }

  function paint(canvas, colourOf) {
    const context = canvas.getContext("2d");
    const pixels = context.createImageData(canvas.width, canvas.height);
    for (let at = 0; at < pixels.data.length; at += 4) {
      const colour = colourOf(at);
      if (colour) pixels.data.set([...colour, OPAQUE], at);
    }
    context.putImageData(pixels, 0, 0);
  }

  async function prepare(card) {
    const [heat, mask, picture] = [".heat", ".mask", ".scores"].map((name) => card.querySelector(name));
    await picture.decode();
    const scores = read(picture, 0, mask.width, mask.height, true);
    const classes = read(picture, 1, mask.width, mask.height, false);
    const tent = (score, centre) => 255 * Math.min(Math.max(1.5 - Math.abs(4 * score - centre), 0), 1);
    paint(heat, (at) => [3, 2, 1].map((centre) => tent(scores[at] / 255, centre)));
    return (background) => paint(mask, (at) => scores[at] > 255 * background && colours[classes[at]]);
  }

  // Curves have a value for each score 0.01, 0.02, ..; between them they are lines.
  function percent(curve, score) {
    const place = 100 * score - 1;
    const from = Math.min(Math.max(Math.floor(place), 0), curve.length - 2);
    if (curve[from] === null || curve[from + 1] === null) return "";
    return `${(curve[from] + (place - from) * (curve[from + 1] - curve[from])).toFixed(1)} %`;
  }

  function show(cards) {
    const background = slider.valueAsNumber;
    for (const draw of cards) draw(background);
    const parts = [`${background.toFixed(3)}: foreground ${percent(curves.foreground, background)}`];
    const change = percent(curves.change, background);
    if (change) parts.push(`of which ±${reach} changes ${change}`);
    if (curves.miou.length) parts.push(`mIoU ${percent(curves.miou, background)}`);
    document.getElementById("shown").value = parts.join(", ");
    for (const mark of document.querySelectorAll(".now")) mark.style.left = `${100 * background}%`;
  }

  Promise.all([...document.querySelectorAll("article")].map(prepare)).then((cards) => {
    slider.addEventListener("input", () => show(cards));
    document.getElementById("reset").addEventListener("click", () => {
      slider.value = slider.defaultValue;
      show(cards);
    });
    document.querySelector(".tools").hidden = false;
    show(cards);
  });
})();
