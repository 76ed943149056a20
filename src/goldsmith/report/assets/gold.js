// The gold, token by token: examples, a page at a time, each token in the colour of its probability.

const EXAMPLES_A_PAGE = 20;
const TOKENS_AT_FIRST = 600;
const CONTEXT_AT_FIRST = 1200;
const TOKEN_CHARACTERS = 400;
const CHANGES = [0.1, 0.5, 2]; // nats; the edges of the colours of change

const SORTS = {
  file: ["File order", null],
  lowest: ["Lowest log P", (report, { b }) => (example) => report.sides[b].log_prob[example]],
  highest: ["Highest log P", (report, { b }) => (example) => negated(report.sides[b].log_prob[example])],
  token: ["Lowest log P a token", (report, { b }) => (example) => perToken(report, b, example)],
  worst: ["Worst token", (report, { b }) => (example) => report.worstLogProb(b, example)],
  gain: ["Largest gain", (report, { a, b }) => (example) => negated(report.change(a, b, example))],
  loss: ["Largest loss", (report, { a, b }) => (example) => report.change(a, b, example)],
};

function negated(value) { return value === null ? null : -value; }

function perToken(report, side, example) {
  const { log_prob: logProb, num_target_tokens: tokens } = report.sides[side];
  return logProb[example] === null || !tokens[example] ? null : logProb[example] / tokens[example];
}

// The numbers of the examples that the state asks for, in its order.
function chosenExamples(report, state) {
  const query = state.query.trim().toLowerCase();
  if (state.only) return [state.only.example];
  const chosen = report.ids.map((_, example) => example).filter((example) => {
    if (state.source !== "" && report.examples.source_name[example] !== state.source) return false;
    if (state.range) {
      const change = report.change(state.a, state.b, example);
      if (change === null || change < state.range[0] || change >= state.range[1]) return false;
    }
    return !query || report.searchText(example).includes(query);
  });
  const key = SORTS[state.sort][1]?.(report, state);
  if (!key) return chosen;
  const keys = new Map(chosen.map((example) => [example, key(example)]));
  const last = (value) => (value === null || value === undefined ? Infinity : value);
  return chosen.sort((one, other) => (last(keys.get(one)) < last(keys.get(other)) ? -1 : last(keys.get(one)) > last(keys.get(other)) ? 1 : one - other));
}

function drawGold(root, report, state, redraw) {
  const paired = report.sides.length > 1;
  const list = el("ol", { class: "examples", id: "examples" });
  const status = el("p", { class: "count", id: "count" });
  const pages = el("nav", { class: "pages", "aria-label": "Pages of examples" });
  const fill = (focusTop = false) => {
    const chosen = chosenExamples(report, state);
    const last = Math.max(0, Math.ceil(chosen.length / EXAMPLES_A_PAGE) - 1);
    state.page = Math.min(state.page, last);
    const first = state.page * EXAMPLES_A_PAGE;
    const shown = chosen.slice(first, first + EXAMPLES_A_PAGE);
    hideHint();
    list.replaceChildren(...shown.map((example) => el("li", {}, exampleCard(report, state, example))));
    status.textContent = chosen.length ? `${count(first + 1)}\u2013${count(first + shown.length)} of ${count(chosen.length)} examples` : "No example matches.";
    const turn = (text, page, isOff) => el("button", { type: "button", disabled: isOff, onclick: () => { state.page = page; fill(true); } }, text);
    pages.replaceChildren(...(last ? [turn("Previous", state.page - 1, state.page === 0),
      el("span", {}, `Page ${state.page + 1} of ${last + 1}`), turn("Next", state.page + 1, state.page === last)] : []));
    if (focusTop) {
      list.scrollIntoView({ block: "start" });
      list.querySelector("[role=option]")?.focus({ preventScroll: true });
    }
  };
  const again = () => { state.page = 0; dropOnly(); fill(); };

  const sorts = Object.entries(SORTS).filter(([name]) => paired || (name !== "gain" && name !== "loss")).map(([name, [text]]) => [name, text]);
  const sources = [...new Set(report.examples.source_name)].sort();
  const search = el("input", { type: "search", id: "search", placeholder: "Text, id or file", value: state.query });
  let waiting = 0;
  search.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(() => { state.query = search.value; again(); }, 120); });
  const controls = el("div", { class: "controls", role: "search", "aria-label": "Examples" },
    el("label", { class: "field grow" }, el("span", {}, "Search"), search),
    select("Sort", sorts, state.sort, (value) => { state.sort = value; again(); }, { id: "sort" }),
    sources.length > 1 ? select("Source", [["", "All sources"], ...sources.map((name) => [name, name || "unknown"])], state.source, (value) => { state.source = value; again(); }, { id: "source" }) : null,
    report.sides.length > 2 ? sideSelects(report, state, redraw) : null,
    paired ? el("div", { class: "field" }, el("span", { "aria-hidden": "true" }, "Show"), segmented("Show",
      [["both", "Both"], ["a", report.sides[state.a].name], ["b", report.sides[state.b].name], ["change", "Change"]].map(([value, text]) => [value, oneLine(text, 24)]),
      state.view, (value) => { state.view = value; drawLegend(); fill(); })) : null);
  const legend = el("div", { class: "legend" });
  const drawLegend = () => legend.replaceChildren(...goldLegend(state));
  drawLegend();
  const range = state.range ? el("button", { type: "button", class: "chip", onclick: () => { state.range = null; redraw(); } },
    `change from ${signed(state.range[0])} to ${signed(state.range[1])} nats`, el("span", { "aria-hidden": "true" }, " \u00D7"), el("span", { class: "hidden" }, ", remove this filter")) : null;
  const only = state.only ? el("button", { type: "button", class: "chip", onclick: () => { state.only = null; redraw(); } },
    "only ", el("bdi", {}, oneLine(report.ids[state.only.example], 40)), el("span", { "aria-hidden": "true" }, " \u00D7"), el("span", { class: "hidden" }, ", remove this filter")) : null;
  const dropOnly = () => { state.only = null; only?.remove(); };
  const notes = report.sides.map((side) => side.note).filter(Boolean);
  if (report.num_examples > report.ids.length) notes.push(`The first ${count(report.ids.length)} of ${count(report.num_examples)} examples are here; sums and calibration are over all.`);
  root.append(controls, legend, ...[...new Set(notes)].map((note) => el("p", { class: "notice" }, note)), el("div", { class: "heading small" }, status, only ?? range), list, pages);
  list.addEventListener("keydown", (event) => tokenKeys(event, list));
  fill();
}

function sideSelects(report, state, redraw) {
  const options = report.sides.map((side, index) => [index, side.name]);
  return [["a", "A"], ["b", "B"]].map(([key, label]) => select(label, options, state[key], (value) => { state[key] = Number(value); state.range = state.only = null; redraw(); }, { id: `side-${key}` }));
}

function goldLegend(state) {
  if (state.view === "change") {
    const names = ["\u22122 or less", "", "", "same", "", "", "+2 or more"];
    return [el("span", {}, "Change of log p, nats"), el("span", { class: "scale", "aria-hidden": "true" }, names.map((_, index) => el("i", { class: `c${index}` }))),
      el("span", {}, "\u22122 or less \u2026 +2 or more; dotted below where it fell")];
  }
  return [el("span", {}, "Probability of the gold token"), el("span", {}, "0"),
    el("span", { class: "scale", "aria-hidden": "true" }, Array.from({ length: 10 }, (_, index) => el("i", { class: `p${index}` }))), el("span", {}, "1"),
    el("span", { class: "low-sample" }, "under 0.1"), el("span", { class: "keys" }, el("kbd", {}, "\u2190\u2192\u2191\u2193"), " tokens ", el("kbd", {}, "n"), " next under 0.1 ", el("kbd", {}, "j"), el("kbd", {}, "k"), " examples ", el("kbd", {}, "/"), " search")];
}

// One example: where it is from, its context in grey, its gold under one side or two.
function exampleCard(report, state, example) {
  const { a, b } = state;
  const paired = report.sides.length > 1 && a !== b;
  const after = report.sides[b].log_prob[example], before = report.sides[a].log_prob[example];
  const change = paired ? report.change(a, b, example) : null;
  const heading = `example-${example}`;
  const numbers = el("p", { class: "log-prob" }, el("span", { class: "label" }, "log P "),
    paired ? arrow(number(before), el("strong", {}, number(after))) : el("strong", {}, number(after)),
    change === null ? null : el("span", { class: change < 0 ? "delta lower" : "delta" }, `${change < 0 ? "\u25BC " : change > 0 ? "\u25B2 " : ""}${signed(change)}`));
  const same = paired && report.sameTokens(a, b, example);
  const view = !paired ? "b" : state.view === "change" && !same ? "both" : state.view;
  const halves = (view === "both" ? [a, b] : view === "a" ? [a] : [b]).map((side) => half(report, state, example, side, { view, other: same ? (side === a ? b : a) : null, named: paired }));
  return el("article", { class: "example", "aria-labelledby": heading, "data-example": example },
    el("header", {}, el("h3", { id: heading }, oneLine(report.ids[example], 80)), sourceOf(report.examples.source[example]), numbers),
    contextOf(report, example), el("div", { class: halves.length > 1 ? "halves" : "" }, halves));
}

function sourceOf(source) {
  if (!source) return null;
  const path = source.replace(/:\d+$/, "");
  const isAbsolute = /^(\/|[A-Za-z]:[\\/])/.test(path);
  const name = source.split(/[\\/]/).at(-1);
  const text = visible(name.length > 64 ? `\u2026${name.slice(-63)}` : name);
  const address = `file://${path.startsWith("/") ? "" : "/"}${path.replaceAll("\\", "/").split("/").map(encodeURIComponent).join("/").replace(/^([A-Za-z])%3A/, "$1:")}`;
  return el("p", { class: "source" },
    isAbsolute && location.protocol === "file:" && isWellFormed(path) ? el("a", { href: address, title: source }, text) : el("span", { title: source }, text),
    el("button", { type: "button", class: "copy", "aria-label": `Copy ${oneLine(source)}`, title: `Copy ${source}`, onclick: () => copy(source) }, "copy"));
}

function isWellFormed(text) { try { encodeURIComponent(text); return true; } catch { return false; } }

async function copy(text) {
  try { await navigator.clipboard.writeText(text); announce("Copied"); } catch { announce("The browser did not allow copying"); }
}

function contextOf(report, example) {
  const context = report.examples.context[example];
  const tokens = report.examples.context_tokens[example];
  if (context === null || context === undefined) return null;
  const text = el("span", { class: "text", dir: "auto" });
  const fill = (whole) => { text.textContent = visible(whole ? context : context.slice(0, CONTEXT_AT_FIRST)) || "(empty)"; };
  fill(false);
  const isLong = context.length > 320;
  const block = el("div", { class: isLong ? "context clamped" : "context" }, el("span", { class: "label" }, tokens ? `Context, ${count(tokens)} tokens` : "Context"), text);
  if (isLong) {
    block.append(el("button", { type: "button", class: "more", "aria-expanded": "false", onclick: (event) => {
      const opened = block.classList.toggle("clamped");
      fill(!opened);
      event.currentTarget.setAttribute("aria-expanded", String(!opened));
      event.currentTarget.textContent = opened ? `Show all ${count(context.length)} characters` : "Show less";
    } }, `Show all ${count(context.length)} characters`));
  }
  return block;
}

function half(report, state, example, side, { view, other, named }) {
  const { log_prob: logProb, name } = report.sides[side];
  const total = report.numTokens(side, example);
  const head = named ? el("h4", {}, view === "change" ? `Change, ${report.sides[state.a].name} to ${report.sides[state.b].name}` : name,
    el("span", { class: "note" }, view === "change" ? "" : `${number(logProb[example])} nats`)) : null;
  if (logProb[example] === null) return el("div", { class: "half" }, head, el("p", { class: "missing" }, "Not scored."));
  if (!total) return el("div", { class: "half" }, head, el("p", { class: "missing" }, "No tokens in this score file; goldsmith score --tokens writes them."));
  const box = el("div", { class: "tokens", role: "listbox", "aria-orientation": "horizontal", "aria-label": `Gold tokens of ${oneLine(report.ids[example])}${named ? `, ${name}` : ""}`, "data-side": side, "data-other": other, dir: "auto" });
  const add = (from, to) => {
    const spans = [];
    for (let token = from; token < to; token++) spans.push(tokenSpan(report, example, side, token, view === "change" ? state.a : null));
    box.append(...spans);
  };
  const atFirst = state.only?.example === example ? Math.max(TOKENS_AT_FIRST, state.only.token + 1) : TOKENS_AT_FIRST;
  add(0, Math.min(total, atFirst));
  box.firstChild.tabIndex = 0;
  const rest = total > atFirst ? el("button", { type: "button", class: "more", onclick: () => { add(atFirst, total); rest.remove(); } }, `Show all ${count(total)} tokens`) : null;
  return el("div", { class: "half" }, head, box, rest);
}

function tokenSpan(report, example, side, token, before) {
  const logProb = report.tokenLogProb(side, example, token);
  const probability = Math.exp(logProb);
  let kind, label = `probability ${percent(probability)}`;
  if (before === null) kind = `p${Math.min(9, Math.floor(probability * 10))}`;
  else {
    const change = logProb - report.tokenLogProb(before, example, token);
    const size = CHANGES.filter((edge) => Math.abs(change) >= edge).length;
    kind = `c${3 + Math.sign(change) * size}`;
    label = `change ${signed(change)} nats, ${label}`;
  }
  const text = report.tokenText(side, example, token);
  const span = el("span", { role: "option", tabindex: "-1", class: `t ${kind}${text.includes("\n") ? " broken" : ""}`, "data-token": token, "aria-label": `${oneLine(text)}, ${label}` });
  let shown = visible(text.length > TOKEN_CHARACTERS ? text.slice(0, TOKEN_CHARACTERS) : text);
  if (text.length > TOKEN_CHARACTERS) shown += `\u2026 (${count(text.length)} characters)`;
  span.textContent = shown.replaceAll("\n", "\u23CE\n");
  return span;
}

// To the token that a link of another section led to: the second side's, where it is shown.
function focusAwaited(state) {
  if (!state.only?.isAwaited) return;
  state.only.isAwaited = false;
  const place = `.t[data-token="${state.only.token}"]`;
  const span = document.querySelector(`#examples [data-side="${state.b}"] ${place}`) ?? document.querySelector(`#examples ${place}`);
  if (!span) return;
  span.scrollIntoView({ block: "center" });
  // Scrolling hides the hint, so the token takes the focus when it is done.
  requestAnimationFrame(() => requestAnimationFrame(() => span.focus({ preventScroll: true })));
}

// The hint: what is known of the token under the pointer or the focus.

function hideHint() {
  const hint = document.getElementById("hint");
  hint.hidden = true;
  document.querySelector("[aria-describedby=hint]")?.removeAttribute("aria-describedby");
}

function showHint(report, span) {
  const hint = document.getElementById("hint");
  const box = span.parentElement;
  const example = Number(span.closest("[data-example]").dataset.example), token = Number(span.dataset.token);
  const side = Number(box.dataset.side);
  const own = report.token(side, example, token);
  const sides = [side];
  if (box.dataset.other !== undefined) sides.push(Number(box.dataset.other));
  sides.sort((one, other) => one - other);
  const rows = [
    ["rank", own.rank === null ? null : count(own.rank)], ["log p", `${number(own.logProb, 3)} nats`],
    ["entropy", own.entropy === null ? null : `${number(own.entropy, 2)} nats`], ["weight", own.weight === 1 ? null : figure(own.weight)],
    ["token id", own.tokenId < 0 ? null : String(own.tokenId)],
  ].filter(([, value]) => value !== null);
  const bar = (probability) => { const fill = el("i", {}); fill.style.width = `${100 * probability}%`; return el("span", { class: "bar", "aria-hidden": "true" }, fill); };
  hint.replaceChildren(...[
    el("p", { class: "what" }, el("span", { class: "text" }, el("bdi", {}, `\u201C${oneLine(own.text, 48)}\u201D`)), el("strong", {}, percent(Math.exp(own.logProb)))),
    sides.length > 1 ? el("p", { class: "moments" }, sides.map((one) => el("span", { class: one === side ? "own" : "" }, `${report.sides[one].name} `, el("b", {}, percent(Math.exp(report.tokenLogProb(one, example, token))))))) : null,
    el("dl", {}, rows.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value)))),
    own.alternatives.length ? el("ol", { "aria-label": "Likeliest tokens" }, own.alternatives.map((one) =>
      el("li", { class: one.isGold ? "gold" : "" }, el("bdi", { class: "text" }, oneLine(one.text, 28)), bar(Math.exp(one.logProb)), el("span", { class: "p" }, one.isGold ? percent(Math.exp(one.logProb)) : roughPercent(Math.exp(one.logProb))))))
      : own.best === null ? el("p", { class: "note" }, "Ranks and alternatives: goldsmith score --tokens") : null,
  ].filter(Boolean));
  hideHint();
  hint.hidden = false;
  span.setAttribute("aria-describedby", "hint");
  if (matchMedia("(max-width: 640px)").matches) { hint.style.left = ""; hint.style.top = ""; return; }
  const place = span.getClientRects()[0] ?? span.getBoundingClientRect();
  const left = Math.max(8, Math.min(place.left, document.documentElement.clientWidth - hint.offsetWidth - 8));
  const below = place.bottom + 8;
  const top = below + hint.offsetHeight > innerHeight && place.top > hint.offsetHeight + 8 ? place.top - hint.offsetHeight - 8 : below;
  hint.style.left = `${left}px`;
  hint.style.top = `${top}px`;
}

function watchTokens(currentReport) {
  const tokenOf = (event) => event.target.closest?.(".t[data-token]");
  document.addEventListener("mouseover", (event) => { const span = tokenOf(event); if (span) showHint(currentReport(), span); });
  document.addEventListener("mouseout", (event) => { if (tokenOf(event) && !document.activeElement?.matches(".t:focus-visible")) hideHint(); });
  document.addEventListener("focusin", (event) => {
    const span = tokenOf(event);
    if (!span) return;
    for (const other of span.parentElement.querySelectorAll("[tabindex='0']")) other.tabIndex = -1;
    span.tabIndex = 0;
    showHint(currentReport(), span);
  });
  document.addEventListener("focusout", (event) => { if (tokenOf(event)) hideHint(); });
  document.addEventListener("click", (event) => { const span = tokenOf(event); if (span) { span.focus({ preventScroll: true }); showHint(currentReport(), span); } });
  addEventListener("scroll", hideHint, { passive: true });
}

// Arrow keys move within an example, n to the next improbable token, j and k between examples.
function tokenKeys(event, list) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const span = event.target.closest("[role=option]");
  if (event.key === "Escape") { hideHint(); return; }
  if (!span) return;
  const box = span.parentElement;
  const all = [...box.children];
  const at = all.indexOf(span);
  let next;
  if (event.key === "ArrowRight") next = all[at + 1];
  else if (event.key === "ArrowLeft") next = all[at - 1];
  else if (event.key === "Home") next = all[0];
  else if (event.key === "End") next = all.at(-1);
  else if (event.key === "ArrowDown" || event.key === "ArrowUp") next = onNextLine(all, at, event.key === "ArrowDown" ? 1 : -1);
  else if (event.key === "n") next = all.slice(at + 1).find((one) => one.matches(".p0, .c0, .c1")) ?? nextBox(list, box, 1)?.querySelector(".p0, .c0, .c1");
  else if (event.key === "j" || event.key === "k") next = nextBox(list, box, event.key === "j" ? 1 : -1)?.querySelector("[tabindex='0']");
  else return;
  event.preventDefault();
  if (!next) return;
  next.focus({ preventScroll: true });
  const place = next.getBoundingClientRect();
  if (place.top < 120 || place.bottom > innerHeight - 40) { next.scrollIntoView({ block: "center" }); next.dispatchEvent(new FocusEvent("focusin", { bubbles: true })); }
}

function onNextLine(all, at, direction) {
  const from = all[at].getClientRects()[0];
  const middle = (from.left + from.right) / 2;
  let best = null, least = Infinity, line = null;
  for (let index = at + direction; index >= 0 && index < all.length; index += direction) {
    const place = all[index].getClientRects()[0];
    if (!place || Math.abs(place.top - from.top) < 4) continue;
    line ??= place.top;
    if (Math.abs(place.top - line) > 4) break;
    const distance = Math.abs((place.left + place.right) / 2 - middle);
    if (distance < least) { least = distance; best = all[index]; }
  }
  return best;
}

function nextBox(list, box, direction) {
  const boxes = [...list.querySelectorAll("[role=listbox]")];
  const own = box.closest("[data-example]");
  for (let index = boxes.indexOf(box) + direction; index >= 0 && index < boxes.length; index += direction) {
    if (boxes[index].closest("[data-example]") !== own) return boxes[index];
  }
  return null;
}
