// Folders of pictures as an archive, made in the browser.
const BLOCK = 512;
const PICTURES = /\.(png|jpe?g|webp|bmp|gif|tiff?)$/i;

// Files below what was dropped: [{path, file}]. Directories answer in parts.
export async function files(entries, folder = "") {
  const found = [];
  for (const entry of entries) {
    if (!entry) continue;
    const path = folder ? `${folder}/${entry.name}` : entry.name;
    if (entry.isFile) {
      found.push({ path, file: await new Promise((done, failed) => entry.file(done, failed)) });
      continue;
    }
    const reader = entry.createReader();
    for (let part; (part = await new Promise((done, failed) => reader.readEntries(done, failed))).length; ) {
      found.push(...(await files(part, path)));
    }
  }
  return found.filter(({ path }) => PICTURES.test(path));
}

// A tar (ustar) of them, a folder for each class: the last folder of each path.
export async function packed(found) {
  const parts = [];
  for (const [i, { path, file }] of found.filter(({ path }) => PICTURES.test(path)).entries()) {
    const steps = path.split("/");
    const ending = steps.at(-1).match(PICTURES)[0].toLowerCase();
    parts.push(header(`${steps.at(-2)}/${String(i).padStart(6, "0")}${ending}`, file.size), file);
    parts.push(new Uint8Array((BLOCK - (file.size % BLOCK)) % BLOCK));
  }
  return new Blob([...parts, new Uint8Array(2 * BLOCK)], { type: "application/x-tar" });
}

function header(name, size) {
  const block = new Uint8Array(BLOCK);
  const encoded = new TextEncoder().encode(name);
  const put = (at, text) => block.set(typeof text === "string" ? new TextEncoder().encode(text) : text, at);
  put(0, encoded.length > 100 ? encoded.slice(encoded.length - 100) : encoded);
  put(100, "0000644\0");
  put(124, `${size.toString(8).padStart(11, "0")}\0`);
  put(136, "00000000000\0");
  put(148, "        ");
  put(156, "0");
  put(257, "ustar\0" + "00");
  const sum = block.reduce((total, byte) => total + byte, 0);
  put(148, `${sum.toString(8).padStart(6, "0")}\0 `);
  return block;
}

// Pictures to try it with: discs, rings and crosses of many places and widths.
export function drawn(each = 24, pixels = 28) {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = pixels;
  const pen = canvas.getContext("2d");
  const chance = (low, high) => low + Math.random() * (high - low);
  const shapes = {
    disc: (x, y, r) => (pen.beginPath(), pen.arc(x, y, r, 0, 7), pen.fill()),
    ring: (x, y, r) => (pen.beginPath(), pen.arc(x, y, r, 0, 7), pen.stroke()),
    cross: (x, y, r) => (pen.fillRect(x - r, y - 1.5, 2 * r, 3), pen.fillRect(x - 1.5, y - r, 3, 2 * r)),
  };
  const found = [];
  for (const [name, draw] of Object.entries(shapes)) {
    for (let i = 0; i < each; i++) {
      pen.fillStyle = "#000";
      pen.fillRect(0, 0, pixels, pixels);
      pen.fillStyle = pen.strokeStyle = "#fff";
      pen.lineWidth = 3;
      draw(chance(10, 18), chance(10, 18), chance(5, 9));
      const png = atob(canvas.toDataURL("image/png").split(",")[1]); // toBlob waits until the browser is idle
      found.push({ path: `shapes/${name}/${i}.png`, file: new Blob([Uint8Array.from(png, (char) => char.charCodeAt(0))], { type: "image/png" }) });
    }
  }
  return found;
}
