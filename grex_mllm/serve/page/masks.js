// Masks as COCO run-length codes, their pixels and their outlines. A mask is {width, height, bits: Uint8Array, row by row}.

export function decode({ size: [height, width], counts }) {
  const bits = new Uint8Array(width * height), runs = [];
  for (let p = 0; p < counts.length; ) {
    let value = 0, k = 0, more = true;
    while (more) {
      const code = counts.charCodeAt(p++) - 48;
      value |= (code & 0x1f) << (5 * k++);
      more = (code & 0x20) !== 0;
      if (!more && code & 0x10) value |= -1 << (5 * k);
    }
    if (runs.length > 2) value += runs[runs.length - 2];
    runs.push(value);
  }
  let at = 0;
  runs.forEach((run, n) => {
    if (n % 2) for (let i = at; i < at + run; i++) bits[(i % height) * width + Math.floor(i / height)] = 1;
    at += run;
  });
  return { width, height, bits };
}

export function facts({ width, height, bits }) { // number of pixels, and the extent [x1, y1, x2, y2]
  let area = 0, left = width, top = height, right = 0, bottom = 0;
  for (let y = 0, i = 0; y < height; y++) for (let x = 0; x < width; x++, i++) if (bits[i]) {
    area++;
    if (x < left) left = x;
    if (x >= right) right = x + 1;
    if (y < top) top = y;
    bottom = y + 1;
  }
  return { area, box: area ? [left, top, right, bottom] : [0, 0, 0, 0] };
}

export function outline(mask) { // a path along the pixel edges, straight runs in one piece
  const { width, height, bits } = mask, [left, top, right, bottom] = facts(mask).box, path = new Path2D();
  const at = (x, y) => x >= 0 && y >= 0 && x < width && y < height && bits[y * width + x] === 1;
  for (let y = top; y <= bottom; y++) {
    for (let x = left, start = -1; x <= right; x++) {
      const edge = x < right && at(x, y) !== at(x, y - 1);
      if (edge && start < 0) start = x;
      if (!edge && start >= 0) { path.moveTo(start, y); path.lineTo(x, y); start = -1; }
    }
  }
  for (let x = left; x <= right; x++) {
    for (let y = top, start = -1; y <= bottom; y++) {
      const edge = y < bottom && at(x, y) !== at(x - 1, y);
      if (edge && start < 0) start = y;
      if (!edge && start >= 0) { path.moveTo(x, start); path.lineTo(x, y); start = -1; }
    }
  }
  return path;
}

export function stencil({ width, height, bits }, [red, green, blue], opacity) { // a canvas of the mask's size in one colour
  const canvas = document.createElement("canvas");
  canvas.width = width; canvas.height = height;
  const context = canvas.getContext("2d"), pixels = context.createImageData(width, height);
  bits.forEach((bit, i) => { if (bit) pixels.data.set([red, green, blue, Math.round(255 * opacity)], 4 * i); });
  context.putImageData(pixels, 0, 0);
  return canvas;
}

export function overlap(first, second) { // intersection over union
  let both = 0, either = 0;
  for (let i = 0; i < first.bits.length; i++) { both += first.bits[i] & second.bits[i]; either += first.bits[i] | second.bits[i]; }
  return either ? both / either : 1;
}

export function union(masks) {
  const bits = new Uint8Array(masks[0].bits.length);
  for (const mask of masks) mask.bits.forEach((bit, i) => { bits[i] |= bit; });
  return { ...masks[0], bits };
}
