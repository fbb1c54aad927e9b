// The page of `grex serve`: one picture, expressions about it, a selected set of its objects. Text is never put in as markup.
import { decode, facts, outline, overlap, stencil, union } from "/page/masks.js";
import { offerSearch } from "/page/search.js";

const COLOURS = [[230, 159, 0], [86, 180, 233], [0, 158, 115], [204, 121, 167], [240, 228, 66], [213, 94, 0], [0, 114, 178]];
const SAID = [255, 64, 129]; // what the described expression leads back to
const FOLLOW_UPS = ["the others", "the one next to them", "only the biggest one"]; // to try
const HOW = { union: "added to", difference: "taken from", restriction: "kept of", neighbour: "next to", complement: "other than" };
const PAUSE = 450; // ms after the last key before an expression is grounded
const $ = (id) => document.getElementById(id);
const state = { info: null, image: null, pixels: null, objects: [], rows: [], chosen: new Set(), boxes: [], points: [], lit: -1, draft: null, said: null, turn: null, from: null, serial: 0 };
let pending = 0, search = null;

// ---------------------------------------------------------------- talking to the server

async function call(path, { json, file, quiet } = {}) {
  const token = sessionStorage.getItem("token"), ticket = crypto.getRandomValues(new Uint32Array(2)).join("-");
  const headers = token ? { Authorization: `Bearer ${token}` } : {}, options = { headers };
  if (json !== undefined) { options.method = "POST"; options.body = JSON.stringify(Object.keys(json).length ? { ...json, ticket } : json); headers["Content-Type"] = "application/json"; }
  if (file) { options.method = "POST"; options.body = file; headers["Content-Type"] = file.type; path += `?ticket=${ticket}`; }
  const asks = json !== undefined || file, watch = asks ? watchLine(ticket, headers) : null;
  pending += asks ? 1 : 0;
  showState();
  try {
    let answer;
    try { answer = await fetch(path, options); }
    catch { throw new Error("The server does not answer; expected it to run; start grex serve again, then reload this page"); }
    if (answer.status === 401) { if (!quiet) await login(); throw Object.assign(new Error((await answer.json()).error), { quiet: true, status: 401 }); }
    if (!answer.ok) throw Object.assign(new Error((await answer.json().catch(() => ({}))).error ?? `status ${answer.status}; expected an answer; try again`), { status: answer.status });
    return answer.headers.get("content-type").startsWith("application/json") ? await answer.json() : await answer.blob();
  } finally {
    pending -= asks ? 1 : 0;
    clearInterval(watch);
    showState();
  }
}

function watchLine(ticket, headers) {
  return setInterval(async () => {
    const answer = await fetch(`/queue?ticket=${ticket}`, { headers }).catch(() => null);
    if (!answer?.ok || !pending) return;
    const { before } = await answer.json();
    if (pending) showState(before ? `${before} before you` : "working");
  }, 700);
}

function showState(text) {
  $("state").textContent = text ?? (pending ? "working" : "ready");
  $("state").className = pending ? "state busy" : "state";
}

async function login() {
  $("login").showModal();
  await new Promise((done) => $("login").addEventListener("close", done, { once: true }));
  sessionStorage.setItem("token", $("token").value.trim());
  location.reload();
  await new Promise(() => {});
}

function note(error, fine = false) {
  if (error.quiet) return;
  const parts = String(error.message ?? error).split("; "), box = make("div", fine ? "note fine" : "note", "", $("notes"));
  make("b", "", fine ? parts[0] : capital(parts[0]), box);
  if (parts.length > 1) make("span", "", parts.slice(1).map(capital).join(". ") + ".", box);
  const close = make("button", "plain", "×", box);
  close.type = "button"; close.ariaLabel = "Close"; close.onclick = () => box.remove();
  while ($("notes").children.length > 3) $("notes").firstChild.remove();
  setTimeout(() => box.remove(), fine ? 3500 : 15000);
}

const tried = (action) => async (...given) => { try { return await action(...given); } catch (error) { note(error); } };
const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);
const percent = (value) => `${Math.round(100 * value)} %`;

function make(tag, kind = "", text = "", parent = null) {
  const node = document.createElement(tag);
  if (kind) node.className = kind;
  if (text !== "") node.textContent = text;
  parent?.append(node);
  return node;
}

// ---------------------------------------------------------------- pictures

async function openFile(file) {
  if (!file) return;
  if (!state.info.types.includes(file.type)) throw new Error(`“${file.name}” is ${file.type || "of an unknown kind"}; expected a PNG, JPEG or WebP picture; save it as one of these`);
  if (file.size > state.info.max_upload_bytes) throw new Error(`“${file.name}” has ${(file.size / 1e6).toFixed(0)} MB; expected at most ${state.info.max_upload_bytes / 1e6} MB; scale it down first`);
  await show(await call("/images", { file }));
}

async function openScene(number) { await show(await call(`/gallery/${number}`, { json: {} })); }

async function show(opened, { restored = null, from = null, keepSearch = false } = {}) {
  const pixels = await createImageBitmap(await call(`/images/${opened.image}/pixels`));
  state.pixels = pixels;
  state.image = opened;
  state.objects = opened.objects.map((object) => prepared(decode(object.mask_rle), object.box_xyxy));
  state.from = from; state.lit = -1; state.draft = null;
  state.rows = []; refer(null);
  for (const { text, follows, picked } of restored ?? []) {
    if (picked !== undefined) { refer(setTurn(readSet(picked))); continue; }
    if (!follows) refer(null);
    state.rows.push(newRow(text));
  }
  if (search?.visible() && !keepSearch) search.close();
  if (opened.scaled_from) note(`Scaled from ${opened.scaled_from.width} × ${opened.scaled_from.height} to ${opened.width} × ${opened.height}`, true);
  for (const button of $("gallery").children) button.ariaPressed = String(opened.image === `scene-${button.dataset.number}`);
  $("examples").replaceChildren();
  for (const text of opened.examples ?? []) {
    const chip = make("button", "chip", text, $("examples"));
    chip.type = "button"; chip.onclick = () => { const row = addRow(text); ground([row]); };
  }
  $("credit").replaceChildren();
  if (opened.credit) {
    $("credit").append(`Photograph, ${opened.credit.licence}: `);
    const origin = make("a", "", new URL(opened.credit.link).hostname, $("credit"));
    origin.href = opened.credit.link; origin.rel = "noreferrer"; origin.target = "_blank";
  }
  $("empty").hidden = true;
  stage.style.setProperty("--aspect", opened.height / opened.width);
  showRows(); showObjects(); showAnswer(); layOut();
}

function prepared(mask, box = null) {
  const { area, box: extent } = facts(mask);
  return { mask, area, box: box ?? extent, path: outline(mask), tints: new Map() };
}

function tint(item, colour, opacity) {
  const key = `${colour} ${opacity}`;
  if (!item.tints.has(key)) item.tints.set(key, stencil(item.mask, colour, opacity));
  return item.tints.get(key);
}

// ---------------------------------------------------------------- find

function newRow(text) {
  const used = new Set(state.rows.map((row) => row.colour)), colour = COLOURS.findIndex((_, n) => !used.has(n));
  const row = { text, colour: colour < 0 ? state.serial % COLOURS.length : colour, result: null, drawn: null, hidden: false, error: "", id: state.serial++, after: state.turn };
  refer(row);
  return row;
}

// What the next expression refers to: the answer of a row, a set that was clicked ({picked}), or nothing. Its objects light up in the picture.
function refer(turn) {
  const set = turn?.picked ?? { objects: turn?.result?.objects ?? [], boxes: [], points: [] };
  state.turn = turn;
  state.chosen = new Set(set.objects); state.boxes = [...set.boxes]; state.points = [...set.points];
  state.said = null; // it described another set
  clearTimeout(describeTimer);
}

function setTurn(picked) { return picked.objects.length + picked.boxes.length + picked.points.length ? { picked, text: "" } : null; }

function named({ objects, boxes, points }) {
  const parts = objects.length ? [`${objects.length > 1 ? "objects" : "object"} ${objects.map((n) => n + 1).join(", ")}`] : [];
  if (boxes.length) parts.push(boxes.length > 1 ? `${boxes.length} boxes` : "a box");
  if (points.length) parts.push(points.length > 1 ? `${points.length} clicks` : "a click");
  return parts.join(" and ");
}

const asText = ({ objects, boxes, points }) => [objects.join(","), ...boxes.map((box) => `b${box.join(",")}`), ...points.map((point) => `p${point.join(",")}`)].join(";");

function readSet(text) { // what of a set in a link fits this picture
  const [first, ...others] = text.split(";"), numbers = (list, count) => { const found = list.split(",").map(Number); return found.length === count && found.every(Number.isFinite) ? [found] : []; };
  const objects = first.split(",").filter(Boolean).map(Number).filter((n) => state.objects[n]);
  return { objects, boxes: others.filter((part) => part[0] === "b").flatMap((part) => numbers(part.slice(1), 4)), points: others.filter((part) => part[0] === "p").flatMap((part) => numbers(part.slice(1), 2)) };
}

// What a row refers to: the set that was clicked before anything was said, if any, and what was said since, the oldest first, back to the
// expression that began the set.
function earlier(row) {
  const said = [];
  let at = row.after;
  for (; at && !at.picked; at = begins(at) ? null : at.after) if (at.text.trim()) said.unshift(at.text.trim());
  return { said, picked: at?.picked ?? null };
}

function trail(row) { // in words
  const { said, picked } = follows(row) ? earlier(row) : { said: [], picked: null };
  return [...(picked ? [named(picked)] : []), ...said, row.text.trim()];
}

function asked(row) { // the same for the server
  const { said, picked } = earlier(row);
  const selected = picked && { objects: picked.objects, boxes_xyxy: picked.boxes, points_xy: picked.points };
  return { ...(selected ? { selected } : {}), ...(said.length ? { history: said } : {}) };
}
const begins = (row) => !row.after || row.result?.operation === "new";
const follows = (row) => Boolean(row.result?.operation) && row.result.operation !== "new";

function withFollowers(row) { // and the rows that refer to it
  const found = [row];
  for (const other of state.rows) if (found.includes(other.after) && follows(other)) found.push(other);
  return found;
}

function removeRow(row) {
  const [, ...others] = withFollowers(row), before = begins(row) ? null : row.after;
  state.rows.splice(state.rows.indexOf(row), 1);
  for (const other of state.rows) if (other.after === row) other.after = before;
  if (state.turn === row) refer(before);
  showRows(); showObjects(); showAnswer(); draw(); keepLink();
  ground(others);
}

function forgetTurn() { clearChosen(); document.querySelector("#new").focus(); }

function showSelected() { // the set that a follow-up refers to
  const turn = state.turn, place = $("selected"), picked = turn?.picked, result = turn?.result, some = Boolean(picked || (result && !result.no_target));
  place.hidden = !picked && !result;
  $("new").placeholder = some ? "and the red one too" : state.rows.length ? "and another expression" : "the two people on the left";
  if (place.hidden) return;
  place.replaceChildren();
  const chip = make("span", "set", "", place), count = numChosen() || (result?.count ?? result?.boxes_xyxy?.length); // the objects themselves, where the model knows any
  make("i", picked ? "swatch picked" : "swatch", "", chip).style.setProperty("--colour", picked ? "white" : `rgb(${COLOURS[turn.colour]})`);
  make("b", "", !some ? "Nothing selected" : count === undefined || count === null ? "Selected" : `${count} selected`, chip);
  const words = make("span", "", picked ? named(picked) : trail(turn).join(" › "), chip);
  words.title = words.textContent;
  const clear = make("button", "plain", "×", chip);
  clear.type = "button"; clear.id = "forget"; clear.ariaLabel = "Clear the selected set: the next expression refers to nothing"; clear.onclick = forgetTurn;
  if (!some) return;
  for (const text of FOLLOW_UPS) {
    const button = make("button", "chip", text, place);
    button.type = "button"; button.onclick = () => ground([addRow(text)]);
  }
}

function addRow(text) {
  const row = newRow(text);
  state.rows.push(row);
  showRows(); showObjects(); showAnswer(); draw();
  return row;
}

const ground = tried(async (rows) => {
  if (!state.image) throw new Error("No picture is open; expected one; drop a picture, or choose one below");
  rows = rows.filter((row) => row.text.trim());
  const texts = rows.map((row) => row.text.trim()), image = state.image;
  if (!texts.length) return;
  for (const { part, start, before } of batches(rows)) {
    let answer;
    try { answer = await call("/ground", { json: { image: image.image, expressions: part.map((row) => row.text.trim()), ...before } }); }
    catch (error) { for (const row of part) { row.result = row.drawn = null; row.error = error.message.split("; ")[0]; } showResults(); draw(); throw error; }
    if (image !== state.image) return;
    part.forEach((row, n) => {
      if (row.text.trim() !== texts[start + n]) return; // edited meanwhile: a later answer comes
      row.result = answer.results[n]; row.error = "";
      row.drawn = prepared(decode(row.result.mask_rle));
      if (row === state.turn) refer(row);
    });
  }
  showObjects(); showAnswer(); draw(); keepLink();
});

function batches(rows) { // neighbouring rows that refer to the same go in one request
  const found = [];
  rows.forEach((row, start) => {
    const before = asked(row), last = found.at(-1);
    if (last && JSON.stringify(last.before) === JSON.stringify(before) && last.part.length < state.info.max_expressions) last.part.push(row);
    else found.push({ part: [row], start, before });
  });
  return found;
}

function showRows() {
  $("rows").replaceChildren();
  for (const row of state.rows) {
    const item = make("li", "", "", $("rows")), swatch = make("button", "swatch", "", item), input = make("input", "", "", item);
    item.dataset.id = row.id;
    swatch.type = "button"; swatch.style.setProperty("--colour", `rgb(${COLOURS[row.colour]})`);
    swatch.ariaLabel = "Show or hide this mask"; swatch.ariaPressed = String(!row.hidden);
    swatch.onclick = () => { row.hidden = !row.hidden; swatch.ariaPressed = String(!row.hidden); draw(); };
    input.type = "text"; input.value = row.text; input.spellcheck = false; input.ariaLabel = "Expression";
    let timer;
    input.oninput = () => { row.text = input.value; clearTimeout(timer); timer = setTimeout(() => ground(withFollowers(row)), PAUSE); };
    input.onkeydown = (event) => { if (event.key === "Enter") { clearTimeout(timer); ground(withFollowers(row)); document.querySelector("li.new input").focus(); } };
    const remove = make("button", "plain remove", "×", item);
    remove.type = "button"; remove.ariaLabel = "Remove this expression";
    remove.onclick = () => removeRow(row);
    make("p", "verdict", "", item);
  }
  const item = make("li", "new", "", $("rows")), input = (make("span", "swatch", "", item), make("input", "", "", item));
  input.type = "text"; input.spellcheck = false;
  input.ariaLabel = "New expression"; input.id = "new";
  let timer, added = false; // the field that is left and taken away tells of it again
  const add = (focus) => {
    if (added || !input.value.trim()) return;
    added = true;
    const row = addRow(input.value), own = document.querySelector(`li[data-id="${row.id}"] input`);
    if (focus === "next") document.querySelector("#new").focus();
    else if (focus) { own.focus(); own.setSelectionRange(own.value.length, own.value.length); }
    ground([row]);
  };
  input.oninput = () => { clearTimeout(timer); timer = setTimeout(() => add(document.activeElement === input ? "stay" : ""), 900); };
  input.onkeydown = (event) => { if (event.key === "Enter") { clearTimeout(timer); add("next"); } };
  input.onblur = () => { clearTimeout(timer); add(""); };
  $("examples").hidden = state.rows.length > 3;
  showResults();
}

function verdict(place, result, error = "", said = "") {
  place.replaceChildren();
  place.className = "verdict";
  if (error) { place.classList.add("none"); make("b", "", capital(error), place); return; }
  if (!result) return;
  if (result.no_target) {
    place.classList.add("none");
    make("b", "", "Nothing here", place); place.append(` · probability ${percent(result.no_target_prob)}`);
    return;
  }
  const count = result.count ?? (result.boxes_xyxy ? result.boxes_xyxy.length : null);
  make("b", "", count === null ? "Found" : `${count} ${count === 1 ? "object" : "objects"}`, place);
  if (HOW[result.operation]) place.append(` · ${HOW[result.operation]} ${said}`);
  else place.append(` · nothing here: ${percent(result.no_target_prob)}`);
}

function showResults() {
  for (const row of state.rows) {
    const item = document.querySelector(`li[data-id="${row.id}"]`);
    if (item) verdict(item.querySelector(".verdict"), row.result, row.error, row.after?.picked ? named(row.after.picked) : `“${row.after?.text.trim()}”`);
  }
  showSelected();
  const some = state.rows.some((row) => row.result) || state.said !== null;
  for (const id of ["copy-json", "save-coco"]) $(id).disabled = !some;
  for (const id of ["save-png", "copy-link"]) $(id).disabled = !state.image;
}

// ---------------------------------------------------------------- describe

function showObjects() {
  $("objects").replaceChildren();
  const { image, objects, info } = state;
  const how = info.segments ? "Click objects in the picture, or drag boxes around them."
    : !image?.proposes ? "Drag boxes around the objects in the picture: this model proposes none by itself."
    : !objects.length ? "The model sees no objects by itself here: drag boxes around what you mean."
    : `Click objects in the picture, or drag boxes around them. ${objects.length} found.`;
  $("hint").textContent = !image ? "Open a picture, then click its objects." : info.describes ? how : `${how} Follow-ups refer to them; this model has no generator and writes nothing about them.`;
  if (!image) return;
  objects.forEach((_, n) => {
    const button = make("button", n === state.lit ? "lit" : "", String(n + 1), $("objects"));
    button.type = "button"; button.ariaPressed = String(state.chosen.has(n)); button.ariaLabel = `Object ${n + 1}`;
    button.onclick = () => { toggle(n); $("objects").children[n]?.focus(); };
    button.onpointerenter = () => light(n); button.onpointerleave = () => light(-1);
    button.onfocus = () => { if (button.matches(":focus-visible")) light(n); };
  });
  state.boxes.forEach((_, n) => {
    const button = make("button", "", `box ${n + 1} ×`, $("objects"));
    button.type = "button"; button.ariaPressed = "true"; button.ariaLabel = `Remove box ${n + 1}`;
    button.onclick = () => { state.boxes.splice(n, 1); chosenChanged(); };
  });
  state.points.forEach((_, n) => {
    const button = make("button", "", `click ${n + 1} ×`, $("objects"));
    button.type = "button"; button.ariaPressed = "true"; button.ariaLabel = `Remove click ${n + 1}`;
    button.onclick = () => { state.points.splice(n, 1); chosenChanged(); };
  });
  if (numChosen()) {
    const clear = make("button", "clear", "clear", $("objects"));
    clear.type = "button"; clear.onclick = clearChosen;
    if (info.describes && !state.said && !state.turn?.picked) { // an answer's objects are described on demand alone
      const write = make("button", "clear", "describe them", $("objects"));
      write.type = "button"; write.onclick = describe;
    }
  }
}

function light(n) {
  if (state.lit === n) return;
  state.lit = n;
  [...$("objects").children].forEach((button, k) => button.classList.toggle("lit", k === n));
  draw();
}

function toggle(n) { if (!state.chosen.delete(n)) state.chosen.add(n); chosenChanged(); }
function clearChosen() { state.chosen.clear(); state.boxes = []; state.points = []; chosenChanged(); }
function numChosen() { return state.chosen.size + state.boxes.length + state.points.length; }

let describeTimer;
function chosenChanged() { // by the user: from now on this set is what a follow-up refers to
  state.said = null;
  state.turn = setTurn({ objects: [...state.chosen], boxes: [...state.boxes], points: [...state.points] });
  showObjects(); showAnswer(); draw(); keepLink();
  clearTimeout(describeTimer);
  if (state.info.describes && numChosen()) describeTimer = setTimeout(describe, 300);
}

const chosenKey = () => JSON.stringify([state.image?.image, [...state.chosen], state.boxes, state.points]);
const describe = tried(async () => {
  const key = chosenKey();
  const answer = await call("/describe", { json: { image: state.image.image, objects: [...state.chosen], boxes_xyxy: state.boxes, points_xy: state.points } });
  if (key !== chosenKey()) return; // the selection changed meanwhile
  const set = union(answer.masks_rle.map(decode));
  state.said = { ...answer, text: answer.expression, set, taken: answer.masks_rle.slice(state.chosen.size).map((code) => prepared(decode(code))), result: null, drawn: null };
  showAnswer(); draw();
  showObjects();
  $("answer").scrollIntoView({ block: innerWidth > 800 ? "nearest" : "center" });
  await sayBack();
});

const sayBack = tried(async () => {
  const said = state.said, text = said.text.trim();
  if (!text) return;
  const answer = await call("/ground", { json: { image: state.image.image, expressions: [text] } });
  if (state.said !== said || said.text.trim() !== text) return;
  said.result = answer.results[0];
  said.drawn = prepared(decode(said.result.mask_rle));
  said.iou = overlap(said.drawn.mask, said.set);
  showBack(); draw(); showResults();
});

function showAnswer() {
  const said = state.said;
  $("answer").hidden = !said;
  if (!said) return showResults();
  $("said").value = said.text;
  $("candidates").replaceChildren();
  for (const option of said.candidates) {
    const button = make("button", "", "", make("li", "", "", $("candidates")));
    button.type = "button"; button.dataset.text = option.expression;
    make("span", "", option.expression, button);
    make("i", "", "", make("span", "meter", "", button)).style.width = `${100 * option.iou}%`;
    make("span", "", percent(option.iou), button);
    button.title = `leads back to ${percent(option.iou)} of the selected area`;
    button.onclick = () => { said.text = option.expression; $("said").value = said.text; showBack(); sayBack(); };
  }
  showBack();
}

function showBack() {
  const said = state.said, back = $("back");
  for (const button of $("candidates").querySelectorAll("button")) button.setAttribute("aria-current", String(button.dataset.text === said.text));
  back.replaceChildren();
  back.className = "verdict";
  if (!said.result || said.result.expression !== said.text.trim()) { back.textContent = said.text.trim() ? "grounding it again …" : ""; return; }
  if (said.result.no_target) { back.classList.add("none"); make("b", "", "Leads back to nothing", back); back.append(` · probability ${percent(said.result.no_target_prob)}`); return; }
  back.classList.add(said.iou >= 0.5 ? "good" : "none");
  make("b", "", said.iou >= 0.5 ? "Leads back to the selection" : "Leads elsewhere", back);
  back.append(` · overlap ${percent(said.iou)}`);
}

let saidTimer;
$("said").onkeydown = (event) => { if (event.key === "Enter") { event.preventDefault(); clearTimeout(saidTimer); sayBack(); } };
$("said").oninput = () => { state.said.text = $("said").value.replace(/\s+/g, " "); showBack(); clearTimeout(saidTimer); saidTimer = setTimeout(sayBack, PAUSE); };

// ---------------------------------------------------------------- drawing

function layOut() {
  const room = $("stage").getBoundingClientRect();
  if (!state.image || !room.width) return; // behind the tiles of a search it has no size
  const gap = innerWidth > 800 ? 24 : 8, { width, height } = state.image;
  const scale = Math.min((room.width - gap) / width, (room.height - gap) / height);
  const shown = [Math.round(width * scale), Math.round(height * scale)], density = devicePixelRatio || 1;
  for (const id of ["picture", "overlay"]) {
    const canvas = $(id);
    canvas.style.width = `${shown[0]}px`; canvas.style.height = `${shown[1]}px`;
    canvas.style.left = `${Math.round((room.width - shown[0]) / 2)}px`; canvas.style.top = `${Math.round((room.height - shown[1]) / 2)}px`;
  }
  $("picture").width = width; $("picture").height = height;
  $("picture").classList.toggle("grown", scale > 3);
  $("picture").getContext("2d").drawImage(state.pixels, 0, 0);
  $("overlay").width = shown[0] * density; $("overlay").height = shown[1] * density;
  $("stage").classList.add("full");
  draw();
}

let waitingFrame = 0;
function draw() {
  cancelAnimationFrame(waitingFrame);
  waitingFrame = requestAnimationFrame(() => state.image && paint($("overlay").getContext("2d"), $("overlay").width, devicePixelRatio || 1));
}

function paint(context, width, density) {
  const scale = width / state.image.width, pen = Math.max(1.5, 2 * density);
  context.setTransform(1, 0, 0, 1, 0, 0);
  context.clearRect(0, 0, width, context.canvas.height);
  context.imageSmoothingEnabled = scale < 3;
  context.setTransform(scale, 0, 0, scale, 0, 0);
  const edge = (path, style, thick, dash = []) => { context.setLineDash(dash.map((d) => d / scale)); context.strokeStyle = style; context.lineWidth = thick / scale; context.lineCap = "round"; context.stroke(path); };
  const mask = (item, colour, opacity) => { context.drawImage(tint(item, colour, opacity), 0, 0); edge(item.path, "rgb(255 255 255 / .9)", pen * 2); edge(item.path, `rgb(${colour})`, pen); };
  for (const row of state.rows) {
    if (row.hidden || !row.drawn) continue;
    if (row.drawn.area) mask(row.drawn, COLOURS[row.colour], 0.42);
    for (const [x1, y1, x2, y2] of row.result.boxes_xyxy ?? []) {
      const box = new Path2D(); box.rect(x1, y1, x2 - x1, y2 - y1);
      edge(box, "rgb(0 0 0 / .55)", pen * 1.7); edge(box, `rgb(${COLOURS[row.colour]})`, pen * 0.9);
    }
  }
  if (state.said?.drawn?.area) { context.drawImage(tint(state.said.drawn, SAID, 0.3), 0, 0); edge(state.said.drawn.path, `rgb(${SAID})`, pen); }
  const lit = state.objects[state.lit];
  if (lit) { context.drawImage(tint(lit, [255, 255, 255], 0.45), 0, 0); edge(lit.path, "rgb(0 0 0 / .7)", pen * 2); edge(lit.path, "white", pen); }
  for (const n of state.chosen) {
    const item = state.objects[n];
    if (state.turn?.picked) { edge(item.path, "rgb(0 0 0 / .8)", pen * 2); edge(item.path, "white", pen * 1.2); } // an answer has its colour
    plate(context, String(n + 1), item.box, scale, density);
  }
  state.said?.taken.forEach((item) => { edge(item.path, "rgb(0 0 0 / .8)", pen * 2); edge(item.path, "white", pen * 1.2); });
  for (const [x1, y1, x2, y2] of [...state.boxes, ...(state.draft ? [state.draft] : [])]) {
    const box = new Path2D(); box.rect(x1, y1, x2 - x1, y2 - y1);
    edge(box, "rgb(0 0 0 / .8)", pen * 2); edge(box, "white", pen, [7 * density, 5 * density]);
  }
  context.setLineDash([]);
  for (const [x, y] of state.points) {
    context.beginPath(); context.arc(x, y, 4.5 * density / scale, 0, 7);
    context.fillStyle = "white"; context.fill(); context.lineWidth = 2 * density / scale; context.strokeStyle = "#16181d"; context.stroke();
  }
}

function plate(context, text, [x1, y1, x2], scale, density) {
  const size = 15 * density / scale, x = (x1 + x2) / 2, y = Math.max(y1, size * 0.8);
  context.font = `600 ${size}px system-ui, sans-serif`;
  context.beginPath(); context.arc(x, y, size * 0.75, 0, 7);
  context.fillStyle = "white"; context.fill(); context.lineWidth = 1.5 * density / scale; context.strokeStyle = "#16181d"; context.stroke();
  context.fillStyle = "#16181d"; context.textAlign = "center"; context.textBaseline = "middle"; context.fillText(text, x, y + size * 0.06);
}

// ---------------------------------------------------------------- pointer and keyboard

function place(event) {
  const box = $("picture").getBoundingClientRect(), { width, height } = state.image;
  return [(event.clientX - box.left) / box.width * width, (event.clientY - box.top) / box.height * height];
}

function objectAt([x, y]) {
  const { width, height } = state.image, i = Math.floor(y) * width + Math.floor(x);
  if (x < 0 || y < 0 || x >= width || y >= height) return -1;
  let best = -1;
  state.objects.forEach((object, n) => { if (object.mask.bits[i] && (best < 0 || object.area < state.objects[best].area)) best = n; });
  return best;
}

let start = null;
const stage = $("stage");
stage.onpointerdown = (event) => { if (!state.image || event.button) return; start = place(event); stage.setPointerCapture(event.pointerId); };
stage.onpointermove = (event) => {
  if (!state.image) return;
  const at = place(event), { width, height } = state.image, near = 5 * width / $("picture").getBoundingClientRect().width;
  if (!start) { const n = objectAt(at); stage.classList.toggle("over", n >= 0); if (event.pointerType === "mouse") light(n); return; }
  const far = Math.hypot(at[0] - start[0], at[1] - start[1]) > near || state.draft;
  if (!far) return;
  const inside = ([x, y]) => [Math.min(width, Math.max(0, x)), Math.min(height, Math.max(0, y))];
  const [a, b] = [inside(start), inside(at)];
  state.draft = [Math.min(a[0], b[0]), Math.min(a[1], b[1]), Math.max(a[0], b[0]), Math.max(a[1], b[1])].map((value) => Math.round(value * 10) / 10);
  draw();
};
stage.onpointerup = (event) => {
  if (!start) return;
  const draft = state.draft, n = objectAt(place(event));
  start = state.draft = null;
  if (draft) {
    if (draft[2] - draft[0] >= 2 && draft[3] - draft[1] >= 2) { state.boxes.push(draft); chosenChanged(); }
    draw();
  } else if (n >= 0) toggle(n);
  else if (state.info.segments) {
    const [x, y] = place(event).map((value) => Math.round(value * 10) / 10), { width, height } = state.image;
    if (x >= 0 && y >= 0 && x < width && y < height) { state.points.push([x, y]); chosenChanged(); }
  }
};
stage.onpointercancel = () => { start = state.draft = null; draw(); };
stage.onpointerleave = () => { if (!start) light(-1); };
stage.onkeydown = (event) => {
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key], count = state.objects.length;
  if (step && count) { event.preventDefault(); light(state.lit < 0 ? (step > 0 ? 0 : count - 1) : (state.lit + step + count) % count); }
  if ((event.key === "Enter" || event.key === " ") && state.lit >= 0) { event.preventDefault(); toggle(state.lit); }
};
document.onkeydown = (event) => {
  if (event.target.matches("input, textarea") || event.ctrlKey || event.metaKey || event.altKey) { if (event.key === "Escape") event.target.blur(); return; }
  if (event.key === "/") { event.preventDefault(); document.querySelector("#new").focus(); }
  if (event.key === "o") $("file").click();
  if (event.key === "s" && search) { event.preventDefault(); $("query").focus(); }
  if (event.key === "Escape") { if (search?.visible()) search.close(); else clearChosen(); }
};

$("file").onchange = tried(async () => { const [file] = $("file").files; $("file").value = ""; await openFile(file); });
document.ondragover = (event) => { event.preventDefault(); stage.classList.add("drop"); };
document.ondragleave = (event) => { if (!event.relatedTarget) stage.classList.remove("drop"); };
document.ondrop = tried(async (event) => { event.preventDefault(); stage.classList.remove("drop"); await openFile(event.dataTransfer.files[0]); });
document.onpaste = tried(async (event) => { if (event.clipboardData.files.length) await openFile(event.clipboardData.files[0]); });
new ResizeObserver(layOut).observe(stage);

// ---------------------------------------------------------------- take it with you

function asJson() {
  const { image, width, height } = state.image, results = state.rows.filter((row) => row.result).map((row) => ({ ...row.result, ...(follows(row) ? asked(row) : {}) }));
  const described = state.said && { expression: state.said.text, objects: [...state.chosen], boxes_xyxy: state.boxes, points_xy: state.points, masks_rle: state.said.masks_rle, candidates: state.said.candidates };
  return { image, width, height, results, ...(described ? { described } : {}) };
}

function asCoco() {
  const { width, height } = state.image, found = state.rows.filter((row) => row.result).map((row) => [trail(row).join(" | "), row.result, row.drawn]);
  if (state.said?.drawn) found.push([state.said.text.trim(), state.said.result, state.said.drawn]);
  const annotations = found.filter(([, result]) => !result.no_target).map(([text, result, drawn], n) => {
    const [x1, y1, x2, y2] = facts(drawn.mask).box;
    return { id: n + 1, image_id: 1, category_id: found.findIndex(([other]) => other === text) + 1, segmentation: result.mask_rle, area: drawn.area, bbox: [x1, y1, x2 - x1, y2 - y1], iscrowd: 0, count: result.count, boxes_xyxy: result.boxes_xyxy };
  });
  const categories = found.map(([name], n) => ({ id: n + 1, name })).filter(({ name, id }) => found.findIndex(([other]) => other === name) + 1 === id);
  return { images: [{ id: 1, file_name: `${state.image.image}.png`, width, height }], annotations, categories };
}

function save(blob, name) {
  const link = make("a");
  link.href = URL.createObjectURL(blob); link.download = name; link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

async function copy(text, what) {
  try { await navigator.clipboard.writeText(text); }
  catch { // no clipboard without a secure origin
    const area = make("textarea", "hidden", text, document.body);
    area.select(); document.execCommand("copy"); area.remove();
  }
  note(`${what} copied`, true);
}

function link() {
  const parts = [], said = state.rows.filter((row) => row.text.trim()), picked = state.turn?.picked;
  if (state.image) parts.push(`image=${encodeURIComponent(state.image.image)}`);
  if (state.from) parts.push(`from=${encodeURIComponent(state.from)}`);
  for (const row of said) {
    if (follows(row) && row.after?.picked) parts.push(`s=${asText(row.after.picked)}`);
    parts.push(`${follows(row) ? "f" : "e"}=${encodeURIComponent(row.text.trim())}`);
  }
  if (picked ? picked.objects.length : said.length && !state.turn) parts.push(`o=${(picked?.objects ?? []).join(",")}`); // an empty one: cleared
  for (const box of picked?.boxes ?? []) parts.push(`b=${box.join(",")}`);
  for (const point of picked?.points ?? []) parts.push(`p=${point.join(",")}`);
  if (search?.asked()) parts.push(`q=${encodeURIComponent(search.asked())}`);
  return `${location.origin}${location.pathname}#${parts.join("&")}`;
}

function keepLink() { if (state.image || search?.asked()) history.replaceState(null, "", link()); }

$("copy-json").onclick = () => copy(JSON.stringify(asJson(), null, 2), "JSON");
$("copy-link").onclick = () => copy(link(), "Link");
$("save-coco").onclick = () => save(new Blob([JSON.stringify(asCoco(), null, 1)], { type: "application/json" }), "grex-coco.json");
$("save-png").onclick = () => {
  const factor = Math.max(1, Math.floor(768 / Math.max(state.image.width, state.image.height))), canvas = make("canvas"), layer = make("canvas");
  canvas.width = layer.width = state.image.width * factor; canvas.height = layer.height = state.image.height * factor;
  const context = canvas.getContext("2d"), lit = state.lit;
  context.imageSmoothingEnabled = false;
  context.drawImage(state.pixels, 0, 0, canvas.width, canvas.height);
  state.lit = -1; paint(layer.getContext("2d"), layer.width, Math.max(1, canvas.width / 900)); state.lit = lit;
  context.drawImage(layer, 0, 0);
  canvas.toBlob((blob) => save(blob, "grex.png"));
};

// ---------------------------------------------------------------- begin

$("theme").onclick = () => {
  const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  document.documentElement.dataset.theme = theme; localStorage.setItem("theme", theme);
};
document.documentElement.dataset.theme = localStorage.getItem("theme") ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");

async function openFound(line, text) { // an image of the folder that is searched, with what was asked
  await show(await call(`/search/${encodeURIComponent(line.id)}`, { json: {} }), { restored: [{ text }], from: line.id, keepSearch: true });
  ground(state.rows);
}

async function restore() {
  const wanted = new URLSearchParams(location.hash.slice(1)), image = wanted.get("image"), from = wanted.get("from");
  if (image) await restorePicture(wanted, image, search ? from : null);
  if (search && wanted.get("q")) search.run(wanted.get("q"));
}

async function restorePicture(wanted, image, from) {
  const scene = image.match(/^scene-(\d+)$/), reopen = (error) => { if (from && error.status === 404) return call(`/search/${encodeURIComponent(from)}`, { json: {} }); throw error; };
  let opened;
  try { opened = scene ? await call(`/gallery/${scene[1]}`, { json: {} }) : await call(`/images/${encodeURIComponent(image)}`).catch(reopen); }
  catch (error) { history.replaceState(null, "", location.pathname); throw error; }
  const restored = [...wanted].flatMap(([key, text]) => (key === "s" ? [{ picked: text }] : key === "e" || key === "f" ? [{ text, follows: key === "f" }] : []));
  await show(opened, { restored, from });
  if (["o", "b", "p"].some((key) => wanted.has(key))) {
    const set = readSet([wanted.get("o") ?? "", ...wanted.getAll("b").map((box) => `b${box}`), ...wanted.getAll("p").map((point) => `p${point}`)].join(";"));
    refer(setTurn(set));
    chosenChanged();
  }
  await ground(state.rows);
}

await tried(async () => {
  state.info = await call("/status");
  $("model").textContent = state.info.model;
  for (let number = 0; number < state.info.scenes + state.info.photographs; number++) {
    const button = make("button", "", "", $("gallery")), image = make("img", "", "", button);
    button.type = "button"; button.dataset.number = number; button.ariaLabel = number < state.info.scenes ? `Scene ${number + 1}` : `Photograph ${number - state.info.scenes + 1}`; button.ariaPressed = "false";
    button.onclick = tried(async () => { await openScene(number); keepLink(); });
    image.alt = "";
    call(`/gallery/${number}/pixels`, { quiet: true }).then((blob) => { image.src = URL.createObjectURL(blob); }, () => button.remove());
  }
  if (!state.info.describes) { $("describe-title").firstChild.data = "Select "; $("describe-title").lastChild.textContent = "what a follow-up refers to"; }
  if (state.info.searches !== null) search = offerSearch(state.info.searches, { call, tried, note, make, open: openFound, changed: keepLink });
  showRows(); showObjects(); showResults();
  await restore();
})();
window.onhashchange = tried(restore);
document.body.dataset.ready = "yes";
