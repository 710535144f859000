"""Style and script of the attention page (models/analysis/page.py), in plain JavaScript."""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a202c; max-width: 1280px; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; }
#heads { display: flex; flex-wrap: wrap; gap: 12px; }
figure { margin: 0; cursor: pointer; } figcaption { font-size: 12px; color: #4a5568; }
canvas { image-rendering: pixelated; border: 1px solid #cbd5e0; width: 150px; height: 150px; }
canvas.strip { display: block; height: 18px; margin-bottom: 3px; }
.wide { overflow-x: auto; }
figure.chosen canvas { border-color: #2b6cb0; }
#detail { position: relative; display: flex; gap: 180px; margin-top: 1rem; font-family: monospace; }
#detail svg { position: absolute; left: 0; top: 0; pointer-events: none; }
.tokens div { line-height: 18px; height: 18px; padding: 0 4px; white-space: pre; cursor: default; }
.tokens div.on { background: #bee3f8; }
table { border-collapse: collapse; font-size: 13px; } th, td { padding: 2px 8px; text-align: right;
  border-bottom: 1px solid #e2e8f0; } td:first-child, th:first-child { text-align: left; }
"""
SCRIPT = """
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const find = id => document.getElementById(id);
const bytes = text => Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
const make = (tag, parent, text) => {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  parent.appendChild(element);
  return element;
};
const shown = text => text.replace(/\\n/g, "\\u23ce").replace(/\\t/g, "\\u21e5");
const text = (layer, side, index) =>
  index < data[layer[side]].length ? shown(data[layer[side]][index]) : "memory " + index;
const modes = [];
data.layers.forEach(layer => Object.keys(layer.heads[0].maps).forEach(mode => {
  if (!modes.includes(mode)) modes.push(mode);
}));
if (data.layers.some(layer => layer.rollout !== null)) modes.push("rollout");
make("option", find("layer"), "all").value = "all";
data.layers.forEach((layer, index) => { make("option", find("layer"), layer.name).value = index; });
modes.forEach(mode => { make("option", find("mode"), mode).value = mode; });
let chosen = null;

function paint(canvas, layer, values) {
  canvas.width = layer.keys;
  canvas.height = layer.queries;
  const context = canvas.getContext("2d");
  const image = context.createImageData(layer.keys, layer.queries);
  values.forEach((value, index) => {
    const shade = Math.pow(value / 255, 0.4);
    image.data.set([255 - 212 * shade, 255 - 147 * shade, 255 - 79 * shade, 255], 4 * index);
  });
  context.putImageData(image, 0, 0);
}

function picture(layer, layerIndex, head, caption, values, keys) {
  const figure = make("figure", find("heads"));
  const canvas = make("canvas", figure);
  paint(canvas, {keys: keys, queries: layer.queries}, values);
  const note = make("figcaption", figure, caption);
  canvas.addEventListener("mousemove", event => {
    const box = canvas.getBoundingClientRect();
    const query = Math.min(layer.queries - 1,
      Math.floor((event.clientY - box.top) / box.height * layer.queries));
    const key = Math.min(keys - 1, Math.floor((event.clientX - box.left) / box.width * keys));
    const weight = (values[query * keys + key] / 255).toFixed(3);
    const from = text(layer, "down", query);
    note.textContent = from + " \\u2192 " + text(layer, "right", key) + ": " + weight;
  });
  canvas.addEventListener("mouseleave", () => { note.textContent = caption; });
  figure.addEventListener("click", () => {
    if (chosen) chosen.classList.remove("chosen");
    chosen = figure;
    figure.classList.add("chosen");
    lines(layer, values, keys);
  });
}

function strips(layer, head) {
  const figure = make("figure", find("heads"));
  const caption = layer.name + ", head " + head.head + ": state by token";
  const canvases = Object.entries(head.tracks).map(([name, values]) => {
    const canvas = make("canvas", figure);
    canvas.className = "strip";
    canvas.title = name;
    const top = name === "kept" ? 1 : Math.max(...values, 1e-9);
    paint(canvas, {keys: values.length, queries: 1}, values.map(value => 255 * value / top));
    return [canvas, name, values];
  });
  const note = make("figcaption", figure, caption);
  canvases.forEach(([canvas, name, values]) => {
    canvas.addEventListener("mousemove", event => {
      const box = canvas.getBoundingClientRect();
      const place = Math.floor((event.clientX - box.left) / box.width * values.length);
      const token = Math.max(0, Math.min(values.length - 1, place));
      note.textContent = text(layer, "down", token) + ": " + name + " " + values[token].toFixed(3);
    });
    canvas.addEventListener("mouseleave", () => { note.textContent = caption; });
  });
}

function lines(layer, values, keys) {
  const detail = find("detail");
  detail.textContent = "";
  const left = make("div", detail);
  const right = make("div", detail);
  left.className = right.className = "tokens";
  for (let query = 0; query < layer.queries; query++) make("div", left, text(layer, "down", query));
  for (let key = 0; key < keys; key++) make("div", right, text(layer, "right", key));
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("width", right.offsetLeft);
  svg.setAttribute("height", Math.max(left.offsetHeight, right.offsetHeight));
  detail.appendChild(svg);
  const draw = only => {
    svg.textContent = "";
    [...left.children].forEach((row, index) => row.classList.toggle("on", index === only));
    for (let query = 0; query < layer.queries; query++) {
      if (only !== null && query !== only) continue;
      for (let key = 0; key < keys; key++) {
        const weight = values[query * keys + key] / 255;
        if (weight < 0.02) continue;
        const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
        line.setAttribute("x1", left.offsetWidth);
        line.setAttribute("x2", right.offsetLeft);
        line.setAttribute("y1", 18 * query + 9);
        line.setAttribute("y2", 18 * key + 9);
        line.setAttribute("stroke", "#2b6cb0");
        line.setAttribute("stroke-opacity", weight);
        svg.appendChild(line);
      }
    }
  };
  [...left.children].forEach((row, index) => {
    row.addEventListener("mouseenter", () => draw(index));
    row.addEventListener("mouseleave", () => draw(null));
  });
  draw(null);
}

function show() {
  find("heads").textContent = "";
  find("detail").textContent = "";
  chosen = null;
  const mode = find("mode").value;
  const layer = find("layer").value;
  data.layers.forEach((each, index) => {
    if (layer !== "all" && Number(layer) !== index) return;
    if (mode === "rollout") {
      if (each.rollout === null) return;
      const caption = each.name + ", rollout";
      picture(each, index, null, caption, bytes(each.rollout), each.queries);
      return;
    }
    each.heads.forEach(head => {
      if (!(mode in head.maps)) return;
      const caption = each.name + ", head " + head.head + ": " + head.pattern;
      picture(each, index, head, caption, bytes(head.maps[mode]), each.keys);
      if (head.tracks) strips(each, head);
    });
  });
}

function patterns() {
  const table = make("table", find("patterns"));
  const names = ["previous_token", "duplicate", "induction", "sink", "entropy"];
  const head = make("tr", table);
  const states = data.layers.some(layer => layer.heads.some(each => each.tracks));
  const tracks = states ? ["kept", "written", "corrected"] : [];
  const means = tracks.map(name => "mean " + name).concat(states ? ["half-life"] : []);
  ["head", "pattern"].concat(names, means)
    .forEach(name => make("th", head, name.replace("_", " ")));
  data.layers.forEach(layer => layer.heads.forEach(each => {
    const row = make("tr", table);
    make("td", row, layer.name + ", head " + each.head);
    make("td", row, each.pattern);
    names.forEach(name => make("td", row, name in each ? each[name].toFixed(3) : "-"));
    tracks.forEach(name => {
      const values = each.tracks ? each.tracks[name] : undefined;
      const mean = values ? values.reduce((sum, value) => sum + value, 0) / values.length : null;
      make("td", row, mean === null ? "-" : mean.toFixed(3));
    });
    if (states) make("td", row, each.half_life ? each.half_life.toPrecision(3) : "-");
  }));
}

find("layer").addEventListener("change", show);
find("mode").addEventListener("change", show);
show();
patterns();
"""
