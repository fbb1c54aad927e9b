// The search bar: an expression against the folder of images that the server was started with; its answers are tiles, with masks.
import { decode, outline, stencil } from "/page/masks.js";

const TILES = 12, SIDE = 384, COLOUR = [230, 159, 0];
const $ = (id) => document.getElementById(id);

// numImages: of the folder.  page: call, tried, note and make as the page has them; open(line, text) shows an image with what was asked;
// changed() is told when the tiles appear or go.
export function offerSearch(numImages, { call, tried, note, make, open, changed }) {
  const form = $("search"), query = $("query"), tiles = $("tiles");
  let serial = 0, asked = "";
  form.hidden = false;
  query.placeholder = `Search ${numImages.toLocaleString("en")} ${numImages === 1 ? "image" : "images"}: two people on a bench`;

  const show = (visible) => { $("viewer").classList.toggle("searching", visible); $("found").hidden = !visible; $("back-to-results").hidden = visible || !asked; changed(); };
  const visible = () => !$("found").hidden;

  const run = tried(async (text) => {
    text = text.replace(/\s+/g, " ").trim();
    if (!text) throw new Error("Nothing to look for; expected an expression; type what the images shall contain");
    const own = ++serial, of = `of ${numImages.toLocaleString("en")}`;
    query.value = asked = text;
    tiles.replaceChildren();
    $("told").textContent = `Searching ${numImages.toLocaleString("en")} images …`;
    show(true);
    let ranked;
    try { ranked = await call("/search", { json: { expression: text, top: TILES, masks: false } }); }
    catch (error) { if (own === serial) { asked = ""; show(false); } throw error; }
    if (own !== serial) return;
    $("told").replaceChildren();
    if (!ranked.num_found) { make("b", "", "In no image", $("told")); $("told").append(` ${of} found “${text}”. Say it more generally.`); return; }
    make("b", "", `In ${ranked.num_found.toLocaleString("en")} ${of} images`, $("told"));
    $("told").append(ranked.num_found > ranked.results.length ? ` · the best ${ranked.results.length}` : "");
    const shown = new Map(ranked.results.map((line) => [line.id, addTile(line, text)]));
    const drawn = await call("/search", { json: { expression: text, top: TILES } });
    if (own === serial) for (const line of drawn.results) shown.get(line.id)?.answer(line);
  });

  function addTile(line, text) {
    const tile = make("button", "tile", "", make("li", "", "", tiles)), canvas = make("canvas", "", "", tile), about = make("span", "about", "", tile);
    const name = make("span", "name", line.file, about), score = make("span", "score", line.score.toFixed(2), about), how = make("span", "how", "", tile);
    let pixels = null, found = null;
    canvas.width = canvas.height = 8;
    tile.type = "button"; tile.dataset.id = line.id; name.title = line.file; score.title = "score: how surely the image contains it";
    tile.ariaLabel = `${line.rank}. ${line.file}, score ${line.score.toFixed(2)}`;
    tile.onclick = tried(async () => { await open(line, text); show(false); });
    const paint = () => {
      if (!pixels) return;
      const factor = Math.max(1, Math.round(SIDE / Math.max(pixels.width, pixels.height))), context = canvas.getContext("2d");
      canvas.width = pixels.width * factor; canvas.height = pixels.height * factor;
      context.imageSmoothingEnabled = factor < 3;
      context.drawImage(pixels, 0, 0, canvas.width, canvas.height);
      if (!found) return;
      const scale = canvas.width / found.width;
      context.setTransform(scale, 0, 0, scale, 0, 0);
      context.drawImage(stencil(found, COLOUR, 0.42), 0, 0);
      const edge = outline(found);
      for (const [style, width] of [["rgb(255 255 255 / .9)", 5], [`rgb(${COLOUR})`, 2.5]]) { context.strokeStyle = style; context.lineWidth = width / scale; context.stroke(edge); }
      context.setTransform(1, 0, 0, 1, 0, 0);
    };
    const broken = (reason) => { tile.classList.add("broken"); how.textContent = reason; };
    call(`/search/${line.id}/pixels?side=${SIDE}`, { quiet: true }).then(createImageBitmap).then((bitmap) => { pixels = bitmap; paint(); }, (error) => broken(error.message.split("; ")[0]));
    return {
      answer(result) {
        if (result.error) { broken(result.error.split("; ")[0]); return; }
        const count = result.count || result.boxes_xyxy?.length;
        how.textContent = result.no_target ? "nothing on a closer look" : !count ? "found" : `${count} ${count === 1 ? "object" : "objects"}`;
        tile.ariaLabel += `, ${how.textContent}`;
        if (!result.no_target && result.mask_pixels) found = decode(result.mask_rle);
        paint();
      },
    };
  }

  form.onsubmit = (event) => { event.preventDefault(); run(query.value); };
  $("back-to-results").onclick = () => { show(true); tiles.querySelector("button")?.focus(); };
  $("close-found").onclick = () => show(false);
  tiles.onkeydown = (event) => {
    const all = [...tiles.querySelectorAll("button")], at = all.indexOf(document.activeElement);
    const columns = Math.max(1, all.filter((tile) => tile.offsetTop === all[0].offsetTop).length);
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[event.key];
    if (!step || at < 0) return;
    event.preventDefault();
    all[Math.min(all.length - 1, Math.max(0, at + step))].focus();
  };
  return { run, visible, close: () => show(false), asked: () => (visible() ? asked : "") };
}
