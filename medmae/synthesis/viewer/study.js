"use strict";
// The viewer of a study: a niivue canvas a panel, all at one place. What is embedded in the page is all there is.
const $ = id => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const AXES = ["sagittal", "coronal", "axial"];
const MOST = 8; // browsers keep about 16 WebGL contexts; more panels open by hand
const views = []; // of the panels that are open
const state = {overlay: "none", swapped: false};

const element = (tag, className, text) => {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
};
const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));
const number = value => Math.abs(value) >= 100 ? value.toFixed(0) : value.toFixed(Math.abs(value) >= 10 ? 1 : 2);

async function loadNiivue() {
  const probe = document.createElement("canvas").getContext("webgl2");
  if (!probe) throw new Error("this browser has no WebGL 2");
  probe.getExtension("WEBGL_lose_context")?.loseContext();
  if (typeof DecompressionStream === "undefined") throw new Error("this browser is too old to unpack it");
  const stream = new Blob([bytes($("niivue").textContent)]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = element("script");
  script.textContent = await new Response(stream).text() + ";globalThis.niivue = niivue;";
  document.head.append(script);
  if (!globalThis.niivue) throw new Error("its script did not start");
}

// --- images: one for all panels that show it -----------------------------------------------------------------------

const image = index => {
  const facts = data.images[index], map = data.maps[facts.kind];
  facts.loading ??= niivue.NVImage.loadFromBase64({
    base64: facts.nifti,
    name: `${index}.nii.gz`,
    colormap: map ? `medmae-${map[0]}` : "gray",
    colormapNegative: map?.[1] ? `medmae-${map[1]}` : "",
    cal_min: facts.window[0],
    cal_max: facts.window[1],
    opacity: map ? Number($("opacity").value) / 100 : 1,
  }).then(volume => {
    if (map) { // below its threshold (here the top) niivue lets the opacity fall with the square of the value
      volume.colormapType = 1;
      volume.cal_min = facts.window[1];
      if (map[1]) [volume.cal_minNeg, volume.cal_maxNeg] = [facts.window[0], 0.999 * facts.window[0]];
    }
    return facts.made = volume;
  });
  return facts.loading;
};

const valueAt = (index, place) => {
  const facts = data.images[index], value = facts.made?.getValue(...place);
  const step = (facts.high - facts.low) / 254;
  if (value === undefined || (value < facts.low - step / 2 && facts.kind !== "difference")) return "background";
  return `${number(value)} ${facts.unit}`.trim();
};

// --- the one place ------------------------------------------------------------------------------------------------

const at = [...data.at];
let moving = false;
function move(place, from) {
  if (moving) return;
  moving = true;
  data.shape.forEach((n, axis) => { at[axis] = Math.max(0, Math.min(n - 1, Math.round(place[axis]))); });
  const share = at.map((v, axis) => (v + 0.5) / data.shape[axis]);
  for (const view of views) {
    if (view !== from) {
      view.nv.scene.crosshairPos = [...share];
      view.nv.drawScene();
    }
    tell(view);
  }
  AXES.forEach((name, axis) => {
    $(`slice-${axis}`).value = at[axis];
    $(`slice-${axis}`).setAttribute("aria-valuetext", `${name} slice ${at[axis] + 1} of ${data.shape[axis]}`);
    $(`note-${axis}`).textContent = `${at[axis] + 1} / ${data.shape[axis]}`;
  });
  moving = false;
}

function tell(view) {
  const overlay = overlayOf(view);
  const over = overlay === null ? "" : `, ${data.images[overlay].kind} ${valueAt(overlay, at)}`;
  view.value.textContent = valueAt(baseOf(view), at) + over;
}

// --- panels -------------------------------------------------------------------------------------------------------

const baseOf = view => state.swapped && view.panel.truth !== null ? view.panel.truth : view.panel.base;
const overlayOf = view => view.panel.overlays[state.overlay] ?? null;

function heading(view) {
  const facts = data.images[baseOf(view)];
  view.box.classList.toggle("synthetic", facts.synthetic);
  view.title.textContent = facts.title;
  view.note.textContent = facts.note;
  view.canvas.setAttribute("aria-label", `${facts.title}, ${facts.note}. ${facts.synthetic ? data.stamp + ". " : ""}` +
    "Arrow keys move left, right, back and front; page up and page down move up and down.");
}

async function dress(view) {
  const wanted = [baseOf(view), overlayOf(view)].filter(index => index !== null);
  if (view.shown?.join() === wanted.join()) return;
  const volumes = await Promise.all(wanted.map(image));
  const {nv} = view, place = [...nv.scene.crosshairPos];
  view.shown = wanted;
  nv.volumes = [];
  volumes.forEach(volume => nv.addVolume(volume));
  nv.scene.crosshairPos = place;
  heading(view);
  nv.drawScene();
}

const refresh = async () => { await Promise.all(views.map(dress)); move(at); };

function keys(event, view) {
  const step = event.shiftKey ? 10 : 1;
  // The right of the patient is on the left of the screen.
  const by = {ArrowLeft: [1, 0, 0], ArrowRight: [-1, 0, 0], ArrowUp: [0, 1, 0], ArrowDown: [0, -1, 0],
              PageUp: [0, 0, 1], PageDown: [0, 0, -1]}[event.key];
  event.stopImmediatePropagation(); // niivue's own keys are another set
  if (!by) return shortcut(event);
  event.preventDefault();
  move(at.map((v, axis) => v + step * by[axis]), null);
}

function shortcut(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
  if (event.key === "t" && !$("swap").hidden) $("swap").click();
  if (event.key === "0") $("reset").click();
}

const made = new Map(); // panels once opened; a closed one is hidden and keeps its canvas
async function open(panel) {
  const known = made.has(panel), view = made.get(panel) ?? build(panel);
  made.set(panel, view);
  const after = views.find(other => data.panels.indexOf(other.panel) > data.panels.indexOf(panel));
  if (!known) {
    $("panels").insertBefore(view.box, after?.box ?? null);
    await view.nv.attachToCanvas(view.canvas);
  }
  view.box.hidden = false;
  views.splice(after ? views.indexOf(after) : views.length, 0, view);
  await dress(view);
  windows[panel.group].forEach((value, end) => { view.ends[end].value = value; }); // moved while it was closed
  if (known) view.nv.updateGLVolume();
  view.nv.onLocationChange = location => move(location.vox, view);
  lay(view);
  link();
  move(at);
}

function close(panel) {
  const [view] = views.splice(views.findIndex(other => other.panel === panel), 1);
  view.box.hidden = true;
  link();
}

function build(panel) {
  const view = {panel, box: element("section", "panel")};
  const head = element("h3"), screen = element("div", "screen"), foot = element("div", "foot");
  view.title = element("span"); view.note = element("small"); view.value = element("output");
  view.canvas = element("canvas");
  view.canvas.tabIndex = 0;
  view.canvas.setAttribute("role", "img");
  head.append(view.title, view.note);
  screen.append(view.canvas, element("span", "stamp", data.stamp));
  const facts = data.images[panel.base];
  view.ends = ["black", "white"].map((name, end) => {
    const input = element("input");
    Object.assign(input, {type: "range", min: facts.low, max: facts.high, step: (facts.high - facts.low) / 254});
    input.value = windows[panel.group][end];
    input.setAttribute("aria-label", `${name} of ${panel.group}`);
    input.addEventListener("input", () => setWindow(panel.group, end, Number(input.value)));
    foot.append(element("span", "", name), input);
    return input;
  });
  foot.append(view.value);
  view.box.append(head, screen, foot);
  view.canvas.addEventListener("keydown", event => keys(event, view));
  view.canvas.addEventListener("keyup", event => event.stopImmediatePropagation());
  view.canvas.addEventListener("pointerdown", () => view.canvas.focus({preventScroll: true}));
  view.nv = new niivue.Niivue({
    isRadiologicalConvention: true, dragAndDropEnabled: false, loadingText: "", logLevel: "error",
    crosshairColor: [0.47, 0.86, 0.47, 0.6], fontColor: [0.8, 0.85, 0.9, 1], backColor: [0, 0, 0, 1],
    sagittalNoseLeft: true, showAllOrientationMarkers: true, show3Dcrosshair: true,
    dragMode: niivue.DRAG_MODE.pan, multiplanarLayout: 2, tileMargin: 2, renderOverlayBlend: 0,
  });
  return view;
}

// Niivue passes on zoom, pan, the turn of the 3D view and, before it tells the others that something moved, the
// crosshair; what sliders and keys do goes through move().
function link() {
  for (const view of views) {
    const others = views.filter(other => other !== view).map(other => other.nv);
    view.nv.broadcastTo(others, {crosshair: true, zoomPan: true, "3d": true});
    view.nv.resizeListener(); // the others have made room, or taken it
  }
}

function lay(view) {
  const {SLICE_TYPE, SHOW_RENDER} = niivue, layout = $("layout").value;
  const whole = layout === "all" || layout === "multiplanar";
  view.nv.opts.multiplanarShowRender = layout === "all" ? SHOW_RENDER.ALWAYS : SHOW_RENDER.NEVER;
  view.nv.setSliceType(whole ? SLICE_TYPE.MULTIPLANAR : SLICE_TYPE[layout.toUpperCase()]);
  view.nv.setCrosshairWidth($("cross").checked ? 1 : 0);
}

// --- black and white ----------------------------------------------------------------------------------------------

const windows = {};
function setWindow(group, end, value) {
  const ends = windows[group];
  ends[end] = value;
  if (ends[0] >= ends[1]) ends[1 - end] = value + (end === 0 ? 1e-3 : -1e-3);
  const touched = views.filter(view => view.panel.group === group);
  for (const view of touched) {
    for (const index of [view.panel.base, view.panel.truth]) {
      const volume = index === null ? undefined : data.images[index].made;
      if (volume) [volume.cal_min, volume.cal_max] = ends;
    }
    view.ends.forEach((input, i) => { input.value = ends[i]; });
    view.nv.updateGLVolume();
  }
}

// --- overlays -----------------------------------------------------------------------------------------------------

function setOverlay(kind) {
  state.overlay = kind;
  const facts = data.images.find(entry => entry.kind === kind);
  $("key").hidden = $("opacity-label").hidden = !facts;
  if (facts) {
    const [above, below] = data.maps[kind].map(name => data.colours[name]);
    const stop = ({R, G, B}, i, share) => `rgb(${R[i]} ${G[i]} ${B[i]}) ${share}%`;
    const stops = above.I.map((v, i) => stop(above, i, below ? 50 + v / 5.1 : v / 2.55));
    if (below) stops.unshift(...below.I.map((v, i) => stop(below, i, 50 - v / 5.1)).reverse());
    const bar = $("key").querySelector("i");
    bar.style.background = `linear-gradient(to right, ${stops.join(", ")})`;
    const ends = facts.window.map(v => `${number(v)} ${facts.unit}`.trim());
    const several = data.images.filter(entry => entry.kind === kind).some(entry => entry.window[1] !== facts.window[1]);
    [$("key-low").textContent, $("key-high").textContent] = several ? ["low", "high"] : ends;
    bar.setAttribute("aria-label", `colours of the ${kind}, ${ends[0]} to ${ends[1]}; ${facts.note}`);
  }
  return refresh();
}

function setOpacity() {
  for (const entry of data.images) if (entry.kind !== "grey" && entry.made) entry.made.opacity = $("opacity").value / 100;
  views.filter(view => overlayOf(view) !== null).forEach(view => view.nv.updateGLVolume());
}

// --- controls -----------------------------------------------------------------------------------------------------

function choices() {
  const kinds = [...new Set(data.panels.flatMap(panel => Object.keys(panel.overlays)))];
  for (const kind of kinds.length ? ["none", ...kinds] : []) {
    const label = element("label"), input = element("input");
    Object.assign(input, {type: "radio", name: "overlay", value: kind, checked: kind === "none"});
    input.addEventListener("change", () => setOverlay(kind));
    label.append(input, kind);
    $("overlays").append(label);
    $("overlays").hidden = false;
  }
  $("swap").hidden = data.panels.every(panel => panel.truth === null);
  data.panels.forEach((panel, index) => {
    windows[panel.group] ??= [...data.images[panel.base].window];
    const label = element("label"), input = element("input");
    Object.assign(input, {type: "checkbox", checked: index < MOST});
    input.addEventListener("change", () => input.checked ? open(panel) : close(panel));
    label.append(input, data.images[panel.base].title);
    $("shown").append(label);
  });
  AXES.forEach((_, axis) => {
    const input = $(`slice-${axis}`);
    Object.assign(input, {min: 0, max: data.shape[axis] - 1, step: 1});
    input.addEventListener("input", () => move(at.map((v, i) => i === axis ? Number(input.value) : v), null));
  });
  $("swap").addEventListener("click", () => {
    state.swapped = !state.swapped;
    $("swap").setAttribute("aria-pressed", String(state.swapped));
    refresh();
  });
  $("layout").addEventListener("input", () => views.forEach(lay));
  $("cross").addEventListener("input", () => views.forEach(lay));
  $("opacity").addEventListener("input", setOpacity);
  $("reset").addEventListener("click", reset);
  document.addEventListener("keydown", shortcut);
}

function reset() {
  for (const {panel} of views) data.images[panel.base].window.forEach((v, end) => setWindow(panel.group, end, v));
  for (const {nv} of views) {
    nv.scene.pan2Dxyzmm = [0, 0, 0, 1];
    nv.setScale(1);
    nv.setRenderAzimuthElevation(110, 10);
  }
  move(data.at, null);
}

$("still").addEventListener("click", () => {
  const asked = $("stills").classList.toggle("asked");
  $("still").setAttribute("aria-expanded", String(asked));
});
(async () => {
  const page = document.documentElement;
  try {
    await loadNiivue();
    page.classList.add("viewer");
    const maps = new niivue.Niivue(); // colours are known to all instances
    for (const [name, colours] of Object.entries(data.colours))
      maps.addColormap(`medmae-${name}`, {...colours, A: colours.I.map(v => v && 255)}); // 0 is transparent
    choices();
    for (const panel of data.panels.slice(0, MOST)) await open(panel);
    page.dataset.ready = "viewer";
  } catch (error) {
    page.classList.remove("viewer");
    $("why").textContent = `The viewer did not start (${error.message}); still pictures instead.`;
    $("why").hidden = false;
    page.dataset.ready = "stills";
  }
})();
