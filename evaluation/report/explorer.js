"use strict";
// Fills the two panels that explorer_page.py lays out. Names of slides, genes and spots are only ever set as text.
(async () => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const choice = (id) => document.getElementById(id);
  const LABELS = {measured: "measured", predicted: "predicted", error: "error", std: "standard deviation", tissue: "tissue"};
  const palettes = read("palettes");
  await Bokeh.embed.embed_item(read("layout"));
  const model = (name) => Bokeh.documents[0].get_model_by_name(name);
  const spots = model("left_spots").data_source, tissue = model("left_tissue").data_source;
  let slide = null;

  function decoded(text) {
    const letters = atob(text), bytes = new Uint8Array(letters.length);
    for (let i = 0; i < letters.length; i++) bytes[i] = letters.charCodeAt(i);
    return bytes;
  }
  const floats = (text) => new Float32Array(decoded(text).buffer);
  const each = (table, change) => Object.fromEntries(Object.entries(table).map(([key, value]) => [key, change(value)]));

  function offer(select, names, labels, wanted) {
    const before = select.value;
    select.replaceChildren(...names.map((name, i) => new Option(labels[i], name)));
    select.value = names.includes(before) ? before : wanted;
  }

  function showSlide() {
    const stored = read(`slide-${choice("slide").value}`);
    slide = {
      ...stored, x: floats(stored.x), y: floats(stored.y),
      low: each(stored.low, floats), step: each(stored.step, floats), codes: each(stored.codes, decoded),
    };
    const has = (name) => name in slide.codes;
    const shown = {...each(LABELS, () => false), ...each(slide.codes, () => true), error: has("measured"), tissue: slide.image !== null};
    slide.layers = Object.keys(LABELS).filter((name) => shown[name]);
    offer(choice("gene"), slide.genes, slide.genes, slide.genes[0]);
    const labels = slide.layers.map((name) => LABELS[name]);
    offer(choice("left"), slide.layers, labels, ["measured", "tissue", "predicted"].find((name) => shown[name]));
    offer(choice("right"), slide.layers, labels, "predicted");
    const image = slide.image;
    tissue.data = image === null ? {url: [], x: [], y: [], width: [], height: []}
      : {url: [image.url], x: [image.x], y: [image.y], width: [image.width], height: [image.height]};
    const rows = slide.layers.filter((name) => name !== "tissue").map((name) => [LABELS[name], `@${name}{0.000}`]);
    for (const side of ["left", "right"]) {
      model(`${side}_spots`).glyph.radius = {value: slide.radius};
      model(`${side}_hover`).tooltips = [["spot", "@spot"], ...rows];
    }
    showGene();
    fit();
  }

  function valuesOf(layer, gene) {
    const [low, step, count] = [slide.low[layer][gene], slide.step[layer][gene], slide.x.length];
    return Float32Array.from(slide.codes[layer].subarray(gene * count, (gene + 1) * count), (code) => low + step * code);
  }

  function showGene() {
    const gene = choice("gene").selectedIndex;
    const data = {x: slide.x, y: slide.y, spot: slide.spots};
    for (const name of ["measured", "predicted", "std"])
      data[name] = name in slide.codes ? valuesOf(name, gene) : new Float32Array(slide.x.length);
    data.error = data.predicted.map((value, i) => value - data.measured[i]);
    spots.data = data;
    showLayers();
  }

  function span(...arrays) {
    const sorted = Float32Array.from(arrays.flatMap((values) => [...values])).sort();
    const at = (share) => sorted[Math.round(share * (sorted.length - 1))];
    const [low, high] = [at(0.01), at(0.99)];
    return high > low ? [low, high] : [low - 0.5, high + 0.5];
  }

  function rangeOf(layer) {
    const data = spots.data;
    if (layer === "error") {
      const limit = Math.max(...span(data.error).map(Math.abs));
      return [-limit, limit];
    }
    return layer === "std" || slide.codes.measured === undefined ? span(data[layer]) : span(data.measured, data.predicted);
  }

  function showLayers() {
    for (const side of ["left", "right"]) {
      const layer = choice(side).value, drawn = model(`${side}_spots`), colors = model(`${side}_colors`);
      const isTissue = layer === "tissue";
      drawn.visible = !isTissue;
      model(`${side}_tissue`).glyph.global_alpha = {value: isTissue ? 1 : 0.4};
      if (isTissue) continue;
      const [low, high] = rangeOf(layer);
      colors.setv({palette: palettes[layer === "error" ? "errors" : "values"], low, high});
      drawn.glyph.fill_color = {field: layer, transform: colors};
    }
  }

  // One pixel of the slide is as high as it is wide on the screen, whatever the shape of the panel.
  function fit() {
    const panel = model("left"), edge = (values, pick) => values.reduce((a, b) => pick(a, b));
    const middle = [], half = [];
    for (const values of [slide.x, slide.y]) {
      const [low, high] = [edge(values, Math.min), edge(values, Math.max)];
      middle.push((low + high) / 2);
      half.push((high - low) / 2 + 3 * slide.radius);
    }
    const size = [panel.inner_width || 1, panel.inner_height || 1];
    const scale = Math.max(half[0] / size[0], half[1] / size[1]);
    [panel.x_range, panel.y_range].forEach((range, i) => {
      const [start, end] = [middle[i] - scale * size[i], middle[i] + scale * size[i]];
      range.setv({start, end, reset_start: start, reset_end: end});
    });
  }

  const slides = read("slides");
  offer(choice("slide"), slides.map((_, i) => String(i)), slides, "0");
  choice("slide").addEventListener("change", showSlide);
  choice("gene").addEventListener("change", showGene);
  for (const side of ["left", "right"]) choice(side).addEventListener("change", showLayers);
  for (const name of ["inner_width", "inner_height"]) model("left").properties[name].change.connect(fit);
  showSlide();
  document.body.dataset.ready = "yes";
})();
