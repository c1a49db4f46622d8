"use strict";
// What a page does beyond showing: it sends what was changed, and takes in what happened. Texts are put in as text, and
// the only HTML that is put in comes from the studio's own templates, where every value is escaped.

const $ = (selector, within = document) => within.querySelector(selector);
const $$ = (selector, within = document) => [...within.querySelectorAll(selector)];
const project = () => "/p/" + document.body.dataset.slug;

function toast(text) {
  const box = $("#toast");
  box.textContent = text;
  box.hidden = false;
  clearTimeout(toast.timer);
  toast.timer = setTimeout(() => { box.hidden = true; }, 6000);
}

// What is to be said on the page that comes next: this one is left before anybody could read it.
function sayNext(text) { sessionStorage.setItem("said", text); }

function sayNow() {
  const text = sessionStorage.getItem("said");
  sessionStorage.removeItem("said");
  if (!text) return;
  if (!text.trim().includes("\n")) { toast(text); return; }
  const box = document.createElement("section"), words = document.createElement("p"), close = document.createElement("button");
  box.className = "panel said";
  words.textContent = text.trim();
  close.textContent = "Close";
  close.addEventListener("click", () => box.remove());
  box.append(words, close);
  $("main").prepend(box);
}

async function send(address, values) {
  let answer;
  try {
    answer = await fetch(address, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(values) });
  } catch {
    return { error: ["the studio does not answer: start it again, and open the address that it prints"] };
  }
  if ((answer.headers.get("Content-Type") || "").startsWith("application/json")) return answer.json();
  if (answer.status === 403) return { error: [await answer.text()] };
  return { error: [`the studio failed at this (${answer.status}); the terminal that it runs in says why`] };
}

// Returns what an address answers, null where it does not; then the page says that it shows what was before.
async function fetched(address) {
  let answer = null;
  try { answer = await fetch(address); } catch { /* nobody listens there */ }
  isLost(!answer || answer.status === 403);
  return answer && answer.ok ? answer : null;
}

async function fetchText(address) {
  const answer = await fetched(address);
  return answer ? answer.text() : "";
}

function isLost(lost) { $("#lost").hidden = !lost; }

function valuesOf(form) {
  const values = {};
  for (const [name, value] of new FormData(form)) values[name] = value;
  return values;
}

// What a field held when it came.
function wasIn(field) {
  return field.matches("select") ? [...field.options].find((one) => one.defaultSelected)?.value ?? "" : field.defaultValue;
}

function setWas(field, text) {
  const typed = field.value;
  if (field.matches("select")) for (const one of field.options) one.defaultSelected = one.value === text;
  else field.defaultValue = text;
  field.value = typed;
}

// Leaves out fields as they came, which another window or an editor may have changed meanwhile; of the others says what they were.
function onlyChanged(form, values) {
  values.was = {};
  for (const field of form.elements) {
    if (!field.name || field.type === "hidden" || !(field.name in values)) continue;
    if (field.value === wasIn(field)) delete values[field.name];
    else values.was[field.name] = wasIn(field);
  }
}

// A form with data-post is sent as JSON; what comes back says what becomes of the page.
document.addEventListener("submit", async (event) => {
  const form = event.target;
  if (!form.dataset.post) return;
  event.preventDefault();
  const button = event.submitter;
  const values = { ...valuesOf(form), ...(button && button.name ? { [button.name]: button.value } : {}) };
  if (form.matches("[data-only-changed]")) onlyChanged(form, values);
  for (const old of $$(".errors", form)) old.textContent = "";
  if (button) button.disabled = true;
  const answer = await send(form.dataset.post, values);
  if (button) button.disabled = false;
  const place = $("[data-errors='']", form);
  const wrong = Object.entries(answer.fields || {}).map(([name, text]) => {
    const own = $(`[data-errors="${CSS.escape(name)}"]`, form) || place;
    own.textContent += (own.textContent && "\n") + text;
    for (let fold = own.closest("details"); fold; fold = fold.parentElement.closest("details")) fold.open = true;
    return own;
  });
  for (const [name, text] of Object.entries(answer.was || {})) setWas(form.elements[name], text);
  if (wrong.length) wrong[0].scrollIntoView({ block: "center" });
  if (answer.error && place) place.textContent = answer.error.join("\n");
  else if (answer.error) toast(answer.error.join("\n"));
  if (answer.html !== undefined) $(form.dataset.target).innerHTML = answer.html;
  if (answer.message) (answer.location || answer.reload ? sayNext : toast)(answer.message);
  if (answer.location) location.assign(answer.location);
  if (answer.reload) location.reload();
});

document.addEventListener("click", (event) => {
  const copy = event.target.closest("[data-copy]");
  if (copy) navigator.clipboard.writeText(copy.dataset.copy).then(() => toast("copied"), () => toast(copy.dataset.copy));
});

function choosesProject() {
  const select = $("#project");
  if (!select) return;
  const page = location.pathname.split("/")[3] || "pictures";
  select.addEventListener("change", () => { if (select.value) location.assign(`/p/${select.value}/${page}`); });
}

// ---- pictures

function pictures() {
  const page = $("#pictures"), grid = $("#grid"), readOnly = document.body.hasAttribute("data-read-only");
  const picked = new Set(), keys = page.dataset.keys.split(" ").filter(Boolean);
  const filter = $("#filter");
  filter.addEventListener("change", () => filter.requestSubmit());

  const countRows = async () => {
    const answer = await fetched(project() + "/pictures/rows");
    if (answer) $("#rows").textContent = (await answer.json()).message;
  };
  countRows();

  const lazy = new IntersectionObserver(async (seen) => {
    for (const { target, isIntersecting } of seen) {
      if (!isIntersecting) continue;
      lazy.unobserve(target);
      const html = await fetchText(target.dataset.more);
      target.insertAdjacentHTML("beforebegin", html);
      target.remove();
      watch();
    }
  }, { rootMargin: "1200px" });
  const watch = () => {
    $$(".more", grid).forEach((more) => lazy.observe(more));
    for (const card of $$(".card", grid)) show(card);
  };
  const show = (card) => {
    const on = picked.has(card.dataset.key);
    card.classList.toggle("picked", on);
    $(".pick input", card).checked = on;
  };
  watch();

  const showUndo = (what) => {
    const button = $("#undo");
    button.hidden = !what || readOnly;
    $("span", button).textContent = what || "";
  };
  $("#undo").addEventListener("click", async () => {
    const answer = await send(project() + "/pictures/undo", {});
    if (answer.error) { toast(answer.error.join("\n")); return; }
    sayNext(answer.message);
    location.reload();
  });

  const save = async (card) => {
    const area = $("textarea", card);
    if (area.value === area.defaultValue || card.dataset.saving) return;
    card.dataset.saving = "yes";
    const sent = area.value;
    const answer = await send(project() + "/pictures/caption", { key: card.dataset.key, was: card.dataset.was, text: sent });
    if (answer.error) {
      delete card.dataset.saving;
      toast(answer.error.join("\n"));
      return;
    }
    card.insertAdjacentHTML("afterend", answer.html);
    const fresh = card.nextElementSibling, controls = "textarea, input, button, summary";
    const at = $$(controls, card).indexOf(document.activeElement), typed = $("textarea", fresh);
    if (area.value !== sent) { typed.value = area.value; fresh.classList.add("dirty"); } // typed while it was saved
    const [from, to] = [area.selectionStart, area.selectionEnd];
    card.remove();
    show(fresh);
    if (at >= 0) ($$(controls, fresh)[at] || typed).focus();
    if (document.activeElement === typed) typed.setSelectionRange(from, to);
    if (answer.conflict !== undefined) {
      const note = document.createElement("div"), use = document.createElement("button");
      note.className = "mine";
      note.append("It was changed elsewhere, to what stands above. Yours: ", document.createElement("br"), answer.conflict, document.createElement("br"));
      use.textContent = "Use mine all the same";
      use.addEventListener("click", () => { $("textarea", fresh).value = answer.conflict; save(fresh); });
      note.append(use);
      $("figcaption", fresh).append(note);
      return;
    }
    showUndo(answer.undo);
    countRows();
    if (document.activeElement !== typed) save(fresh); // what was typed meanwhile, and then left
  };
  grid.addEventListener("click", (event) => {
    if (!event.target.matches(".take")) return;
    const card = event.target.closest(".card");
    $("textarea", card).value = event.target.textContent;
    save(card);
  });
  grid.addEventListener("input", (event) => {
    const card = event.target.closest(".card");
    if (card && event.target.matches("textarea")) card.classList.toggle("dirty", event.target.value !== event.target.defaultValue);
  });
  grid.addEventListener("change", (event) => {
    const card = event.target.closest(".card");
    if (!card) return;
    if (event.target.matches("textarea")) { save(card); return; }
    picked[event.target.checked ? "add" : "delete"](card.dataset.key);
    show(card);
    selected();
  });
  grid.addEventListener("keydown", (event) => {
    if (event.target.matches("textarea") && event.key === "Enter" && (event.ctrlKey || event.metaKey)) save(event.target.closest(".card"));
    if (event.target.matches("textarea") && event.key === "Escape") {
      event.target.value = event.target.defaultValue;
      event.target.closest(".card").classList.remove("dirty");
      event.target.blur();
    }
  });
  addEventListener("beforeunload", (event) => { if ($(".card.dirty")) event.preventDefault(); });

  const form = $("#tags");
  if (!form) return;
  const selected = () => {
    $("output", form).textContent = `${picked.size} selected`;
    form.classList.toggle("some", picked.size > 0);
  };
  $("#all").addEventListener("change", (event) => {
    picked.clear();
    if (event.target.checked) keys.forEach((key) => picked.add(key));
    $$(".card", grid).forEach(show);
    selected();
  });
  const operation = form.elements.operation;
  const shape = () => {
    form.elements.other.hidden = operation.value !== "replace";
    form.elements.tag.hidden = operation.value === "dedupe";
  };
  operation.addEventListener("change", shape);
  shape();
  const dialog = $("#changes");
  let wanted = null;
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (!picked.size) { toast("select pictures first"); return; }
    wanted = { ...valuesOf(form), keys: [...picked] };
    const answer = await send(project() + "/pictures/tags", wanted);
    if (answer.error) { toast(answer.error.join("\n")); return; }
    wanted.was = answer.was;
    $("div", dialog).innerHTML = answer.html;
    $("#apply").disabled = !answer.count;
    dialog.showModal();
    dialog.scrollTop = 0;
  });
  $("#apply").addEventListener("click", async () => {
    const answer = await send(project() + "/pictures/tags", { ...wanted, apply: true });
    dialog.close();
    if (answer.error) { toast(answer.error.join("\n")); return; }
    sayNext(answer.message);
    location.reload();
  });
  $("#cancel").addEventListener("click", () => dialog.close());
}

// ---- curves, as pages/parts.html draws them, but from numbers that go on

const SVG = "http://www.w3.org/2000/svg";
function element(name, attributes, parent) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (parent) parent.append(made);
  return made;
}

function ticks(low, high) {
  const raw = (high - low) / 5 || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= raw);
  const found = [];
  for (let n = Math.ceil(low / step); n <= Math.floor(high / step); n += 1) found.push(n * step);
  return found;
}

function drawChart(box, lines, yLabel) {
  box.replaceChildren();
  const all = lines.flatMap((line) => line.points.concat(line.band || [])).filter(([, y]) => y !== null);
  if (!all.length) { box.textContent = "nothing yet"; return; }
  let low = Infinity, high = -Infinity, first = Infinity, last = -Infinity;
  for (const [x, y] of all) {
    low = Math.min(low, y); high = Math.max(high, y); first = Math.min(first, x); last = Math.max(last, x);
  }
  const margin = (high - low) * 0.05 || Math.abs(low) * 0.1 || 1;
  low -= margin; high += margin;
  if (last === first) last = first + 1;
  const atX = (x) => 100 * (x - first) / (last - first), atY = (y) => 100 * (high - y) / (high - low);
  const short = (value) => String(Number(value.toPrecision(6)));
  const chart = element("svg", { class: "chart", role: "img", "aria-label": `${yLabel} by step` }, box);
  for (const y of ticks(low, high)) {
    element("line", { x2: "100%", y1: atY(y) + "%", y2: atY(y) + "%" }, chart);
    element("text", { x: -6, y: atY(y) + "%", dy: 4, "text-anchor": "end" }, chart).textContent = short(y);
  }
  for (const x of ticks(first, last)) {
    element("text", { x: atX(x) + "%", y: "100%", dy: 18, "text-anchor": "middle" }, chart).textContent = short(x);
  }
  element("text", { x: -6, dy: -10, "text-anchor": "end" }, chart).textContent = yLabel;
  element("text", { x: "100%", y: "100%", dy: 34, "text-anchor": "end" }, chart).textContent = "step";
  const inner = element("svg", { viewBox: "0 0 100 100", preserveAspectRatio: "none" }, chart);
  const places = (points) => points.filter(([, y]) => y !== null).map(([x, y]) => `${atX(x).toFixed(2)},${atY(y).toFixed(2)}`).join(" ");
  for (const line of lines) {
    if (line.band) element("polygon", { class: line.look, points: places(line.band) }, inner);
    element("polyline", { class: line.look, points: places(line.points) }, inner);
    const alone = line.points.filter(([, y]) => y !== null);
    if (alone.length === 1) element("circle", { class: line.look, cx: atX(alone[0][0]) + "%", cy: atY(alone[0][1]) + "%", r: 3 }, chart);
  }
  const legend = document.createElement("p");
  legend.className = "legend";
  for (const line of lines) {
    const entry = document.createElement("span"), mark = element("svg", { class: line.look });
    element("rect", { width: "100%", height: "100%" }, mark);
    entry.append(mark, line.name);
    legend.append(entry);
  }
  box.append(legend);
}

function thinned(rows, most) {
  if (rows.length <= most) return rows;
  const width = Math.ceil(rows.length * 3 / most), kept = [];
  for (let start = 0; start < rows.length; start += width) {
    const part = rows.slice(start, start + width);
    let least = part[0], largest = part[0];
    for (const row of part) { if (row[1] < least[1]) least = row; if (row[1] > largest[1]) largest = row; }
    kept.push(...new Set([part[0], least, largest].sort((a, b) => a[0] - b[0])));
  }
  if (kept.at(-1) !== rows.at(-1)) kept.push(rows.at(-1));
  return kept;
}

// ---- train

function train() {
  const page = $("#train"), run = page.dataset.run;
  let wasBusy = Boolean($("#status [data-busy]"));
  const rested = async () => {
    const html = await fetchText(location.href), fresh = new DOMParser().parseFromString(html, "text/html").querySelector("#controls");
    if (fresh && $("#controls")) $("#controls").replaceWith(fresh);
  };
  let rows = [], have = 0, validations = [], source = null, drawing = 0;

  const draw = () => {
    drawing = 0;
    const shown = thinned(rows, 1500);
    const column = (number) => shown.map((row) => [row[0], row[number]]);
    drawChart($("#loss"), [{ name: "loss", look: "c0 faint", points: column(1) }, { name: "running mean", look: "c0", points: column(2) }], "loss");
    drawChart($("#rate"), [{ name: "learning rate", look: "c1", points: column(3) }], "rate");
    $("#validation").hidden = !validations.length;
    const ends = (sign) => validations.map(([step, loss, half]) => [step, loss === null ? null : loss + sign * half]);
    if (validations.length) {
      drawChart($("#validation div"), [{ name: "held-out loss, 95 % interval", look: "c2", points: validations.map(([s, l]) => [s, l]),
        band: [...ends(1), ...ends(-1).reverse()] }], "loss");
    }
    page.dataset.steps = rows.length ? rows.at(-1)[0] : 0;
  };
  const later = () => { drawing = drawing || requestAnimationFrame(draw); };

  const begin = async () => {
    const answer = await fetched(`${project()}/train/curves?run=${encodeURIComponent(run)}`);
    if (!answer) { setTimeout(begin, 3000); return; }
    const curves = await answer.json();
    rows = curves.points; have = curves.rows; validations = curves.validations;
    page.dataset.received = have;
    later();
    listen(curves.mark);
  };
  const listen = (since) => {
    if (source) source.close();
    source = new EventSource(`${project()}/train/live?run=${encodeURIComponent(run)}&since=${since}`);
    const on = (kind, handle) => source.addEventListener(kind, (event) => handle(JSON.parse(event.data)));
    on("points", ({ from, points }) => {
      const fresh = points.slice(Math.max(0, have - from));
      rows.push(...fresh); have += fresh.length;
      page.dataset.received = have;
      later();
    });
    on("reset", begin);
    on("validation", (value) => { validations = value; later(); });
    on("status", (html) => {
      $("#status").innerHTML = html;
      const busy = Boolean($("#status [data-busy]"));
      if (wasBusy && !busy) rested(); // what can be done next is another
      wasBusy = busy;
      for (const button of $$("[data-when]")) button.hidden = (button.dataset.when === "busy") !== busy;
    });
    on("samples", (value) => samples(value));
    on("log", (text) => {
      const log = $("#log"), atEnd = log.scrollTop + log.clientHeight >= log.scrollHeight - 20;
      log.textContent = text;
      $("#log-part").hidden = !text;
      if (atEnd) log.scrollTop = log.scrollHeight;
    });
    source.onopen = () => isLost(false);
    source.onerror = () => {
      isLost(true);
      if (source.readyState === EventSource.CLOSED) setTimeout(begin, 3000);
    };
  };

  const slider = $("#step");
  let found = { steps: [], prompts: [] };
  const place = (path) => `${project()}/sample/${path.split("/").map(encodeURIComponent).join("/")}?run=${encodeURIComponent(run)}`;
  const samples = (value) => {
    const follows = !found.steps.length || Number(slider.value) >= found.steps.length - 1;
    found = value;
    $("#samples").hidden = !found.steps.length;
    if (!found.steps.length) return;
    slider.max = found.steps.length - 1;
    if (follows) slider.value = slider.max;
    showStep();
  };
  const showStep = () => {
    const step = found.steps[slider.value], box = $("#shots");
    $("#samples output").textContent = "step " + step;
    box.replaceChildren(...found.prompts.map(({ title, pictures }) => {
      const figure = document.createElement("figure"), words = document.createElement("figcaption");
      words.textContent = title;
      if (pictures[step]) {
        const image = document.createElement("img");
        image.className = "large";
        image.alt = `${title}, step ${step}`;
        image.src = place(pictures[step]);
        figure.append(image);
      }
      figure.append(words);
      return figure;
    }));
  };
  slider.addEventListener("input", showStep);
  begin();
}

// ---- compare

function compare() {
  const chosen = [];
  const box = $("#wiper"), range = $("input", box), over = $(".over", box);
  const wipe = () => { over.style.clipPath = `inset(0 0 0 ${range.value}%)`; };
  range.addEventListener("input", wipe);
  document.addEventListener("click", (event) => {
    const image = event.target.closest(".matrix img, .reference img");
    if (!image) return;
    chosen.push(image);
    if (chosen.length > 2) chosen.shift();
    $$(".picked").forEach((other) => other.classList.remove("picked"));
    chosen.forEach((other) => other.classList.add("picked"));
    if (chosen.length < 2) return;
    if (box.hidden) setTimeout(() => box.scrollIntoView({ block: "nearest" }));
    box.hidden = false;
    $$("img", box).forEach((shown, number) => { shown.src = chosen[number].src; shown.alt = chosen[number].alt; });
    $$("p span", box).forEach((words, number) => { words.textContent = chosen[number].alt; });
    wipe();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && event.target.matches(".matrix img, .reference img")) event.target.click();
  });
}

// ---- begin: a dropped command, config or GUI settings

function drops() {
  const box = $(".drop");
  const stop = (event) => { event.preventDefault(); box.classList.toggle("over", event.type === "dragover"); };
  for (const kind of ["dragover", "dragleave", "drop"]) box.addEventListener(kind, stop);
  const take = async (file) => {
    if (!file) return;
    if (file.size > 3e6) { toast("this is larger than a command or settings are"); return; }
    $("[name=text]", box).value = await file.text();
    $("[name=name]", box).value = file.name;
  };
  box.addEventListener("drop", (event) => take(event.dataTransfer.files[0]));
  $("input[type=file]", box).addEventListener("change", (event) => take(event.target.files[0]));
}

// ---- queue

async function jobs() {
  const box = $("#jobs"), html = await fetchText("/queue?part=jobs"), at = document.activeElement;
  if (!html || $(":active", box)) return; // a button that is being pressed stays
  const job = at.form?.elements.job?.value;
  box.innerHTML = html;
  if (!job || at.isConnected) return;
  const form = $$("form", box).find((one) => one.elements.job.value === job);
  if (form) ($(`button[value="${at.value}"]`, form) || $("button", form))?.focus();
}

if (new URLSearchParams(location.search).has("token")) history.replaceState(null, "", location.pathname);
choosesProject();
if ($("#pictures")) pictures();
if ($("#train")) train();
if ($("#wiper")) compare();
if ($(".drop")) drops();
if ($("#jobs")) setInterval(jobs, 2000);
sayNow();
