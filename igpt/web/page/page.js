// The page: a picture is its tokens, here as in the model. The server is asked for a file's tokens and for rows.
const $ = (id) => document.getElementById(id);
const HIDDEN = 0.28; // opacity of the rows that the model will not see
let model, side, picture, keep, brush, page = "complete", running = null;

async function ask(path, options) {
  let reply;
  try {
    reply = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("igpt web does not answer: has it been ended in its terminal?");
  }
  if (!reply.ok) throw new Error((await reply.json()).error);
  return reply;
}

function fail(error) {
  if (error.name === "AbortError") return;
  $("error").textContent = error.message;
  $("error").hidden = false;
}

// What a click starts: an error in it is shown, an earlier one is gone.
const tried = (action) => async (event) => {
  $("error").hidden = true;
  try {
    await action(event);
  } catch (error) {
    fail(error);
  }
};

// --- pictures

function sheet(canvas) {
  canvas.width = canvas.height = side;
  return canvas.getContext("2d");
}

function paint(context, tokens, from, opacity = () => 1) {
  const rows = tokens.length / side, image = context.createImageData(side, rows);
  tokens.forEach((token, i) => {
    image.data.set([...model.colours[token], 255 * opacity(Math.floor(i / side))], 4 * i);
  });
  context.putImageData(image, 0, from);
}

function show() {
  paint($("editor").getContext("2d"), picture, 0, (row) => (row < keep ? 1 : HIDDEN));
  $("edge").style.top = `calc(${(100 * keep) / side}% - 1px)`;
  $("keep").value = keep;
  $("kept").textContent = `${keep} of ${side} rows are kept; the rest is not seen.`;
}

async function open(file) {
  if (!file) return;
  if (file.size > model.most.bytes)
    throw new Error(`${file.name} has ${file.size.toLocaleString("en")} bytes; at most ` +
                    `${model.most.bytes.toLocaleString("en")} are taken`);
  picture = (await (await ask("/picture", { method: "POST", body: file })).json()).tokens;
  show();
}

// --- drawing

const distance = (a, b) => a.reduce((sum, value, i) => sum + (value - b[i]) ** 2, 0);

function nearest(colour) {
  const far = model.colours.map((other) => distance(other, colour));
  return far.indexOf(Math.min(...far));
}

// As many colours as differ the most: each next one is the farthest from all before it.
function swatches(count) {
  const chosen = [nearest([0, 0, 0])], far = model.colours.map(() => Infinity);
  while (chosen.length < Math.min(count, far.length)) {
    model.colours.forEach((colour, i) => {
      far[i] = Math.min(far[i], distance(colour, model.colours[chosen.at(-1)]));
    });
    chosen.push(far.indexOf(Math.max(...far)));
  }
  return chosen;
}

function choose(token, button) {
  brush = token;
  for (const other of $("colours").children) other.setAttribute("aria-checked", other === button);
}

function layOutColours() {
  for (const token of swatches(24)) {
    const button = document.createElement("button"), name = `rgb(${model.colours[token].join(", ")})`;
    button.style.background = name;
    button.setAttribute("role", "radio");
    button.ariaLabel = name;
    button.onclick = () => choose(token, button);
    $("colours").append(button);
  }
  choose(nearest([0, 0, 0]), $("colours").firstChild);
}

function place(event) {
  const box = $("editor").getBoundingClientRect();
  return [event.clientX - box.left, event.clientY - box.top].map((at) => (at / box.width) * side);
}

function stroke([x0, y0], [x1, y1]) {
  const width = +$("width").value, steps = Math.ceil(2 * Math.hypot(x1 - x0, y1 - y0)) || 1;
  for (let i = 0; i <= steps; i++) {
    const left = Math.floor(x0 + ((x1 - x0) * i) / steps - (width - 1) / 2);
    const top = Math.floor(y0 + ((y1 - y0) * i) / steps - (width - 1) / 2);
    for (let y = Math.max(0, top); y < Math.min(side, top + width); y++)
      for (let x = Math.max(0, left); x < Math.min(side, left + width); x++) picture[y * side + x] = brush;
  }
  show();
}

function drawWith(canvas) {
  let last = null;
  canvas.onpointerdown = (event) => {
    canvas.setPointerCapture(event.pointerId);
    stroke((last = place(event)), last);
  };
  canvas.onpointermove = (event) => {
    if (last) stroke(last, (last = place(event)));
  };
  canvas.onpointerup = canvas.onpointercancel = () => (last = null);
}

// --- completions

function figures(kept, count) {
  const grid = $(page);
  grid.replaceChildren();
  return Array.from({ length: count }, (_, i) => {
    const figure = document.createElement("figure"), canvas = document.createElement("canvas");
    const caption = document.createElement("figcaption"), use = document.createElement("button");
    canvas.setAttribute("aria-label", `${page === "samples" ? "Sample" : "Completion"} ${i + 1}`);
    use.textContent = "edit";
    use.title = "Take it as the picture to draw on and to complete";
    use.hidden = true;
    caption.append(`${i + 1}`, use);
    figure.append(canvas, caption);
    grid.append(figure);
    const context = sheet(canvas), tokens = [...kept];
    if (kept.length) paint(context, kept, 0);
    use.onclick = () => {
      picture = [...tokens];
      show();
      turnTo("complete");
    };
    return {
      add(row) {
        paint(context, row, tokens.length / side);
        tokens.push(...row);
      },
      end: () => (use.hidden = false),
    };
  });
}

async function* lines(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let text = "", part; !(part = await reader.read()).done; ) {
    const whole = (text + part.value).split("\n");
    text = whole.pop();
    yield* whole.map((line) => JSON.parse(line));
  }
}

async function complete() {
  if (running) return running.abort();
  const rows = page === "samples" ? 0 : keep, count = +$("count").value, began = performance.now();
  const wish = {
    tokens: picture, rows, completions: count, temperature: +$("temperature").value,
    top_k: +$("top-k").value || null, seed: Math.floor(Math.random() * 2 ** 32),
  };
  running = new AbortController();
  const there = figures(picture.slice(0, rows * side), count);
  say();
  $("status").textContent = "waiting for its turn …";
  const { signal } = running;
  let row = rows;
  try {
    const body = JSON.stringify(wish);
    for await (const drawn of lines(await ask("/complete", { method: "POST", body, signal }))) {
      if (drawn.error) throw new Error(drawn.error);
      there.forEach((figure, i) => figure.add(drawn[i]));
      row += 1;
      $("status").textContent = `row ${row} of ${side}, ${((performance.now() - began) / 1000).toFixed(1)} s`;
    }
    if (row < side) throw new Error("igpt web went away while it was drawing");
    there.forEach((figure) => figure.end());
    $("status").textContent += `, seed ${wish.seed}`;
  } finally {
    if (row < side) $("status").textContent = signal.aborted ? `stopped after row ${row} of ${side}` : "";
    running = null;
    say();
  }
}

// --- the rest of the page

function say() {
  $("temperature-said").textContent = (+$("temperature").value).toFixed(2);
  $("top-k-said").textContent = +$("top-k").value || "all";
  $("count-said").textContent = $("count").value;
  $("go").textContent = running ? "Stop" : page === "samples" ? "Sample" : "Complete";
  $("go").classList.toggle("stop", !!running);
}

function turnTo(name) {
  if (running) running.abort();
  page = name;
  $("error").hidden = true;
  $("status").textContent = "";
  for (const tab of document.querySelectorAll("nav button"))
    tab.setAttribute("aria-selected", tab.dataset.page === name);
  $("probe").hidden = name !== "probe";
  $("draw").hidden = name === "probe";
  $("draw").dataset.page = name;
  say();
}

function drawCurve({ layers, best_layer: best, valid_accuracy: valid, test_accuracy: test, strength, pictures, classes }) {
  const points = Object.entries(layers).map(([layer, share]) => [+layer, 100 * share]);
  const shares = points.map((point) => point[1]), chance = 100 / classes;
  const low = Math.floor(Math.min(chance, ...shares) / 10) * 10, high = Math.ceil((Math.max(...shares) + 0.1) / 10) * 10;
  const last = Math.max(1, ...points.map((point) => point[0]));
  const x = (layer) => 46 + (640 * layer) / last, y = (share) => 300 - (270 * (share - low)) / (high - low);
  const rules = [], step = high - low > 40 ? 10 : 5;
  for (let share = low; share <= high; share += step)
    rules.push(`<line class="rule" x1="46" x2="686" y1="${y(share)}" y2="${y(share)}"/>` +
               `<text x="38" y="${y(share) + 4}" text-anchor="end">${share}%</text>`);
  const every = Math.ceil(last / 16);
  const names = points.filter(([layer]) => layer % every === 0)
    .map(([layer]) => `<text x="${x(layer)}" y="320" text-anchor="middle">${layer}</text>`);
  const dots = points.map(([layer, share]) =>
    `<circle cx="${x(layer)}" cy="${y(share)}" r="${layer === best ? 6 : 3.5}"` +
    `${layer === best ? ' class="best"' : ""}><title>layer ${layer}: ${share.toFixed(1)}%</title></circle>`);
  const at = points.find(([layer]) => layer === best);
  const said = at && `<text class="said" x="${Math.max(66, x(best))}" y="${y(at[1]) - 13}" text-anchor="middle">${at[1].toFixed(1)}%</text>`;
  $("curve").innerHTML = `<svg viewBox="0 12 710 333" role="img" aria-label="Validation accuracy of each layer">
    ${rules.join("")}<line class="chance" x1="46" x2="686" y1="${y(chance)}" y2="${y(chance)}"/>
    <text x="686" y="${y(chance) - 6}" text-anchor="end">chance</text>
    <polyline class="line" points="${points.map(([layer, share]) => `${x(layer)},${y(share)}`).join(" ")}"/>
    ${dots.join("")}${said || ""}${names.join("")}
    <text x="366" y="340" text-anchor="middle">layer; the last is the final norm's output</text></svg>`;
  $("probe-said").textContent = `Layer ${best} is the best on validation, ${(100 * valid).toFixed(1)}% with C = ${strength}; ` +
    `on the test pictures it has ${(100 * test).toFixed(1)}% of ${classes} classes. ` +
    `Pictures of train, valid and test: ${pictures.join(", ")}.`;
}

async function start() {
  model = await (await ask("/model")).json();
  side = model.side;
  picture = Array(side * side).fill(model.blank);
  keep = Math.max(1, Math.floor(side / 2));
  const size = model.parameters < 1e7 ? (model.parameters / 1e6).toFixed(1) : Math.round(model.parameters / 1e6);
  $("facts").textContent = [`${model.name}: ${size} M parameters`, `${side} × ${side} pixels`,
    `${model.colours.length} colours`, model.trained].filter(Boolean).join(", ");
  document.title = `Image GPT · ${model.name}`;
  for (const name of ["complete", "samples"])
    $(name).innerHTML = `<p class="nothing">${name === "samples" ? "Pictures out of nothing appear here, row by row."
      : "Open, drop or draw a picture and choose how much of it is kept:<br>what the model makes of it appears here, row by row."}</p>`;
  sheet($("editor"));
  $("keep").max = side - 1;
  $("top-k").max = Math.min(model.colours.length, 64);
  $("count").max = model.most.completions;
  $("temperature").max = Math.min(2, model.most.temperature);
  layOutColours();
  drawWith($("editor"));
  show();

  $("keep").oninput = (event) => { keep = +event.target.value; show(); };
  $("other").oninput = ({ target: { value } }) =>
    choose(nearest([1, 3, 5].map((i) => parseInt(value.slice(i, i + 2), 16))), null);
  for (const id of ["temperature", "top-k", "count"]) $(id).oninput = say;
  $("file").onchange = tried(async ({ target }) => {
    try { await open(target.files[0]); } finally { target.value = ""; }
  });
  $("emoji").onclick = tried(async () => {
    picture = (await (await ask(`/emoji/${Math.floor(Math.random() * 1e6)}`)).json()).tokens;
    show();
  });
  $("clear").onclick = tried(() => { picture.fill(model.blank); show(); });
  $("go").onclick = tried(complete);
  $("go").disabled = false;
  for (const tab of document.querySelectorAll("nav button")) tab.onclick = () => turnTo(tab.dataset.page);
  for (const kind of ["dragover", "dragleave", "drop"])
    addEventListener(kind, (event) => {
      event.preventDefault();
      $("drop").classList.toggle("over", kind === "dragover");
    });
  addEventListener("drop", tried((event) => open(event.dataTransfer.files[0])));
  addEventListener("paste", tried((event) => open(event.clipboardData.files[0])));
  if (model.probe) {
    drawCurve(model.probe);
    $("tab-probe").hidden = false;
  }
  say();
}

start().catch(fail);
