"use strict";
// The viewer. Planes are base 85 of zlib of residuals (see slices.py); a decoded slice is {ct, masks, uncertainty?}, one byte a pixel.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const get = (id) => document.getElementById(id);
  if (!("DecompressionStream" in window)) {
    get("trouble").hidden = false;
    return;
  }
  const rows = data.rows.length, columns = data.columns.length, count = data.planes.ct.length;
  const viewer = get("viewer"), axial = get("axial"), coronal = get("coronal"), slider = get("slice");
  const state = { k: data.start, level: -600, width: 1500, opacity: 0.35, outline: false };
  const cache = new Map();
  let overview = null, shown = null, pointer = null;

  const digits = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%,()*+-;.=:?@^_`{|}~";
  const digit = Uint8Array.from({ length: 128 }, (_, code) => Math.max(0, digits.indexOf(String.fromCharCode(code))));

  function fromBase85(text) {
    const out = new Uint8Array(Math.floor(4 * text.length / 5));
    for (let i = 0, o = 0; i < text.length; i += 5, o += 4) {
      let value = 0;
      for (let j = i; j < i + 5; j++) value = 85 * value + (j < text.length ? digit[text.charCodeAt(j)] : 84);
      for (let j = 0; j < 4; j++) out[o + j] = value >>> (24 - 8 * j);
    }
    return out;
  }

  async function decode(text, height, width) {
    const stream = new Blob([fromBase85(text)]).stream().pipeThrough(new DecompressionStream("deflate"));
    const out = new Uint8Array(await new Response(stream).arrayBuffer());
    for (let r = 0, i = 0; r < height; r++) {
      for (let c = 0; c < width; c++, i++) { // median edge detector
        const left = c ? out[i - 1] : 0, above = r ? out[i - width] : 0, corner = r && c ? out[i - width - 1] : 0;
        const low = Math.min(left, above), high = Math.max(left, above);
        out[i] += corner >= high ? low : corner <= low ? high : left + above - corner;
      }
    }
    return out;
  }

  async function decodeAll(planes, height) {
    const names = Object.keys(planes);
    const decoded = await Promise.all(names.map((name) => decode(planes[name], height, columns)));
    return Object.fromEntries(names.map((name, i) => [name, decoded[i]]));
  }

  function load(k) {
    if (!cache.has(k)) {
      const planes = Object.fromEntries(Object.entries(data.planes).map(([name, all]) => [name, all[k]]));
      cache.set(k, decodeAll(planes, rows));
      if (cache.size > 150) cache.delete(cache.keys().next().value);
    }
    return cache.get(k);
  }

  function greys() {
    return Uint8ClampedArray.from({ length: 256 }, (_, v) => {
      const hu = data.hu.lowest + data.hu.step * v;
      return Math.round(255 * ((hu - state.level) / state.width + 0.5));
    });
  }

  function paint(canvas, planes, height) {
    canvas.width = columns;
    canvas.height = height;
    const context = canvas.getContext("2d", { willReadFrequently: true }), image = context.createImageData(columns, height);
    const pixels = image.data, table = greys();
    for (let i = 0; i < planes.ct.length; i++) {
      pixels[4 * i] = pixels[4 * i + 1] = pixels[4 * i + 2] = table[planes.ct[i]];
      pixels[4 * i + 3] = 255;
    }
    data.layers.filter((layer) => layer.on).forEach((layer) => blend(pixels, planes[layer.plane], layer));
    context.putImageData(image, 0, 0);
  }

  function blend(pixels, plane, layer) {
    const inside = (i) => i >= 0 && i < plane.length && (plane[i] & layer.mask) === layer.equals;
    const core = (i) => inside(i - 1) && inside(i + 1) && inside(i - columns) && inside(i + columns);
    for (let i = 0; i < plane.length; i++) {
      let alpha = state.opacity;
      if (!layer.mask) alpha *= plane[i] / data.uncertaintySteps;
      else if (!inside(i)) continue;
      else if (state.outline) {
        if (core(i)) continue;
        alpha = 1;
      }
      for (let c = 0; c < 3; c++) pixels[4 * i + c] += alpha * (layer.color[c] - pixels[4 * i + c]);
    }
  }

  async function show(k) {
    state.k = Math.max(0, Math.min(count - 1, k));
    slider.value = state.k + 1;
    const text = `${state.k + 1} of ${count}, infection ${data.infection_ml[state.k].toFixed(2)} ml`;
    slider.setAttribute("aria-valuetext", text);
    get("status").textContent = text;
    for (const line of document.querySelectorAll(".cursor")) line.style.top = `${100 * (count - state.k - 0.5) / count}%`;
    const asked = state.k, planes = await load(asked);
    if (state.k !== asked) return; // another slice was asked for meanwhile
    shown = planes;
    paint(axial, planes, rows);
    readOut();
    document.body.dataset.drawn = asked;
    for (const near of [asked + 1, asked - 1]) if (near >= 0 && near < count) load(near);
  }

  function redraw() {
    if (shown) paint(axial, shown, rows);
    if (overview) paint(coronal, overview, count);
  }

  function setWindow(button) {
    state.level = Number(button.dataset.level);
    state.width = Number(button.dataset.width);
    for (const other of document.querySelectorAll("[data-level]")) other.setAttribute("aria-pressed", other === button);
    redraw();
  }

  function setLayer(layer, on) {
    layer.on = on;
    document.querySelector(`[data-layer=${layer.id}]`).checked = on;
    redraw();
  }

  const moves = {
    ArrowUp: () => state.k + 1, ArrowRight: () => state.k + 1, ArrowDown: () => state.k - 1, ArrowLeft: () => state.k - 1,
    PageUp: () => state.k + 10, PageDown: () => state.k - 10, Home: () => 0, End: () => count - 1,
  };

  function onKey(event) {
    const target = event.target;
    if (event.ctrlKey || event.metaKey || event.altKey || !(target === document.body || viewer.contains(target))) return;
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    const layer = data.layers.find((one) => one.key === key), presets = document.querySelectorAll("[data-level]");
    if (key in moves) {
      if (target.type === "range" && target !== slider) return; // the other slider has these keys itself
      show(moves[key]());
    } else if (layer) setLayer(layer, !layer.on);
    else if (key === "m") {
      const on = !data.layers.some((one) => one.on);
      data.layers.forEach((one) => setLayer(one, on && one.mask > 0));
    } else if (key === "o") get("outline").click();
    else if (presets[Number(key) - 1]) setWindow(presets[Number(key) - 1]);
    else return;
    event.preventDefault();
  }

  let turned = 0; // a notch of a wheel is one slice; a trackpad sends many small turns
  function onWheel(event) {
    if (event.ctrlKey) return; // zoom of the browser
    event.preventDefault();
    turned += event.deltaMode ? 40 * event.deltaY : event.deltaY;
    if (Math.abs(turned) < 40) return;
    show(state.k - Math.sign(turned));
    turned = 0;
  }

  function readOut() {
    const box = axial.getBoundingClientRect();
    const c = pointer ? Math.floor(columns * (pointer.clientX - box.left) / box.width) : -1;
    const r = pointer ? Math.floor(rows * (pointer.clientY - box.top) / box.height) : -1;
    if (!shown || c < 0 || r < 0 || c >= columns || r >= rows) {
      get("readout").textContent = "";
      return;
    }
    const hu = data.hu.lowest + data.hu.step * shown.ct[r * columns + c];
    get("readout").textContent = `row ${data.rows[r] + 1}, column ${data.columns[c] + 1}: ${String(hu).replace("-", "−")} HU`;
  }

  function pickSlice(event) {
    const box = event.currentTarget.getBoundingClientRect();
    show(count - 1 - Math.floor(count * (event.clientY - box.top) / box.height));
  }

  function start() {
    const [row, column, slice] = data.sizeMm, [perRow, perColumn] = data.stepVoxels;
    const across = columns * column * perColumn;
    axial.style.aspectRatio = `${across} / ${rows * row * perRow}`;
    coronal.style.aspectRatio = `${across} / ${count * slice}`;
    coronal.style.width = `min(100%, ${420 * across / (count * slice)}px)`; // not higher than 420
    document.addEventListener("keydown", onKey);
    axial.parentElement.addEventListener("wheel", onWheel, { passive: false });
    coronal.parentElement.addEventListener("wheel", onWheel, { passive: false });
    for (const type of ["pointermove", "pointerleave"]) {
      axial.addEventListener(type, (event) => { pointer = type === "pointermove" ? event : null; readOut(); });
    }
    for (const part of [coronal, get("bars")]) {
      part.addEventListener("pointerdown", pickSlice);
      part.addEventListener("pointermove", (event) => { if (event.buttons & 1) pickSlice(event); });
    }
    slider.addEventListener("input", () => show(Number(slider.value) - 1));
    get("outline").addEventListener("change", (event) => { state.outline = event.target.checked; redraw(); });
    const setOpacity = () => {
      state.opacity = get("opacity").value / 100;
      get("percent").textContent = `${get("opacity").value} %`;
      redraw();
    };
    get("opacity").addEventListener("input", setOpacity);
    for (const layer of data.layers) {
      const box = document.querySelector(`[data-layer=${layer.id}]`);
      layer.on = box.checked; // a reloaded page keeps its switches
      box.addEventListener("change", () => setLayer(layer, box.checked));
    }
    state.outline = get("outline").checked;
    for (const button of document.querySelectorAll("[data-level]")) button.addEventListener("click", () => setWindow(button));
    document.body.classList.add("interactive");
    viewer.hidden = false;
    setOpacity();
    show(state.k);
    decodeAll(data.coronal, count).then((planes) => { overview = planes; redraw(); });
    axial.focus({ preventScroll: true });
  }

  start();
})();
