// The tokens that differ most between two sides, where both cut the gold into the same tokens.

const MOST_DIFFERING = 25;
const BEFORE_CHARACTERS = 64;

// What the table may hold: name -> [button, whether a change belongs, what an empty table says].
const DIRECTIONS = {
  either: ["Either way", () => true, "Every token has the same probability under both."],
  higher: ["Higher", (change) => change > 0, "No token is likelier."],
  lower: ["Lower", (change) => change < 0, "No token is less likely."],
};

const CELLS = { token: "token", before: "p-a", after: "p-b", change: "by", example: "place" }; // classes

// Column -> [order of its first click, key of a row]; the table begins with the largest change.
const TOKEN_SORTS = {
  before: [1, (row) => row.before],
  after: [1, (row) => row.after],
  change: [-1, (row) => Math.abs(row.change)],
  example: [1, (row) => row.example],
};

// The tokens of largest |change| of log p, largest first; ties in the order of the data.
function tokensThatDiffer(report, a, b, belongs, most = MOST_DIFFERING) {
  let found = [], least = 0;
  const cut = () => {
    found.sort((one, other) => Math.abs(other.change) - Math.abs(one.change) || one.example - other.example || one.token - other.token);
    found = found.slice(0, most);
    if (found.length === most) least = Math.abs(found.at(-1).change);
  };
  report.ids.forEach((_, example) => {
    if (!report.sameTokens(a, b, example)) return;
    for (let token = 0, total = report.numTokens(a, example); token < total; token++) {
      const before = report.tokenLogProb(a, example, token), after = report.tokenLogProb(b, example, token);
      const change = after - before;
      if (change === 0 || Math.abs(change) <= least || !belongs(change)) continue;
      found.push({ example, token, before, after, change });
      if (found.length >= 8 * most) cut();
    }
  });
  cut();
  return found;
}

// Why there is no such table; null where there is one.
function whyNoTokens(report, a, b) {
  const without = [a, b].filter((side) => !report.hasTokens(side)).map((side) => `\u201C${report.sides[side].name}\u201D`);
  if (without.length) return `Which tokens differ most is not known: ${without.join(" and ")} ${without.length > 1 ? "have" : "has"} no tokens in the score file; goldsmith score --tokens writes them.`;
  const both = report.ids.map((_, example) => example).filter((example) => report.numTokens(a, example) && report.numTokens(b, example));
  if (!both.length) return "Which tokens differ most is not known: no example has tokens on both sides.";
  if (!both.some((example) => report.sameTokens(a, b, example))) return "No table of the tokens that differ most: the two cut the gold into different tokens, so none stands beside one of the other.";
  return null;
}

function drawDiffering(root, report, state) {
  const { a, b } = state;
  const why = whyNoTokens(report, a, b);
  const section = el("div", { class: "differing", id: "differing" });
  root.append(section);
  const heading = el("h2", {}, "Tokens that differ most");
  if (why) { section.append(el("div", { class: "heading" }, heading), el("p", { class: "notice" }, why)); return; }
  const names = [report.sides[a].name, report.sides[b].name];
  const both = report.ids.filter((_, example) => report.numTokens(a, example) && report.numTokens(b, example)).length;
  const alike = report.ids.filter((_, example) => report.sameTokens(a, b, example)).length;
  state.tokens ??= { direction: "either", by: "change", order: -1 };
  const own = state.tokens;

  const heads = { token: "Token, after what precedes it", before: `p, ${names[0]}`, after: `p, ${names[1]}`, change: "Change, nats", example: "Example" };
  const headRow = el("tr", { role: "row" });
  const body = el("tbody", { role: "rowgroup" });
  const empty = el("p", { class: "missing", hidden: true });
  const note = el("p", { class: "note" });
  const fill = () => {
    const [, belongs, none] = DIRECTIONS[own.direction];
    const rows = tokensThatDiffer(report, a, b, belongs);
    const key = TOKEN_SORTS[own.by][1];
    const largest = (one) => Math.abs(one.change);
    rows.sort((one, other) => own.order * (key(one) - key(other)) || largest(other) - largest(one) || one.example - other.example || one.token - other.token);
    headRow.replaceChildren(...Object.entries(heads).map(([name, text]) => el("th", {
      scope: "col", role: "columnheader", class: CELLS[name], "aria-sort": name in TOKEN_SORTS ? (own.by !== name ? "none" : own.order > 0 ? "ascending" : "descending") : null,
    }, name in TOKEN_SORTS ? el("button", { type: "button", class: "sort", id: `tokens-by-${name}`, onclick: () => sortBy(name) },
      own.by !== name ? null : el("span", { "aria-hidden": "true" }, own.order > 0 ? "\u2191 " : "\u2193 "), text) : text)));
    body.replaceChildren(...rows.map((row) => differingRow(report, state, row, names)));
    empty.textContent = none;
    empty.hidden = rows.length > 0;
    table.hidden = rows.length === 0;
    note.textContent = [
      rows.length < MOST_DIFFERING ? `All ${count(rows.length)} that differ` : `The ${MOST_DIFFERING} of largest change`,
      alike < both ? `, of the ${count(alike)} of ${count(both)} examples that both cut alike` : "",
      report.num_examples > report.ids.length ? `, of the first ${count(report.ids.length)} examples` : "",
      "; p is the probability of the gold token.",
    ].join("");
    note.hidden = rows.length === 0;
  };
  const sortBy = (name) => {
    own.order = own.by === name ? -own.order : TOKEN_SORTS[name][0];
    own.by = name;
    fill();
    document.getElementById(`tokens-by-${name}`).focus({ preventScroll: true });
    announce(`Sorted by ${heads[name]}, ${own.order > 0 ? "ascending" : "descending"}`);
  };
  const table = el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Tokens that differ most" },
    el("table", { role: "table", "aria-label": "Tokens that differ most", class: "numbers tokens-table" },
      el("thead", { role: "rowgroup" }, headRow), body));
  section.append(
    el("div", { class: "heading" }, heading, segmented(`Change of the probability, to \u201C${names[1]}\u201D`, Object.entries(DIRECTIONS).map(([name, [text]]) => [name, text]), own.direction,
      (value) => { own.direction = value; fill(); })),
    note, empty, table);
  fill();
}

function differingRow(report, state, row, names) {
  const { example, token, before, after, change } = row;
  const total = report.numTokens(state.b, example);
  const cell = (name, label, ...children) => el("td", { role: "cell", class: CELLS[name] }, label ? el("span", { class: "own-label", "aria-hidden": "true" }, label) : null, ...children);
  return el("tr", { role: "row" },
    el("th", { scope: "row", role: "rowheader", class: "token" },
      el("span", { class: "before-it", dir: "auto" }, el("bdi", {}, precedingText(report, state.b, example, token))),
      el("mark", { dir: "auto" }, el("bdi", {}, oneLine(report.tokenText(state.b, example, token), 48)))),
    cell("before", names[0], exactPercent(before)), cell("after", names[1], exactPercent(after)),
    cell("change", "change, nats", el("span", { class: change < 0 ? "delta lower" : "delta" }, `${change < 0 ? "\u25BC" : "\u25B2"} ${signed(change)}`)),
    cell("example", null, el("a", { href: "#gold", onclick: () => { state.only = { example, token, isAwaited: true }; state.page = 0; } },
      el("bdi", {}, oneLine(report.ids[example], 40)), el("span", { class: "hidden" }, `, token ${count(token + 1)}`)),
      el("span", { class: "note", "aria-hidden": "true" }, `token ${count(token + 1)} of ${count(total)}`)));
}

// The end of the gold before a token, on one line.
function precedingText(report, side, example, token) {
  let text = "", first = token;
  while (first > 0) {
    const longer = report.tokenText(side, example, first - 1) + text;
    if (longer.length > BEFORE_CHARACTERS) break;
    text = longer;
    first--;
  }
  const shown = text === "" ? "" : oneLine(text, 10 * BEFORE_CHARACTERS);
  return first > 0 ? `\u2026 ${shown.trimStart()}` : shown.trimStart();
}

// Two improbable tokens are told apart: below a ten-thousandth by their order of magnitude.
function exactPercent(logProb) {
  const probability = Math.exp(logProb);
  if (probability >= 1e-4) return percent(probability);
  return `${(probability * 100).toExponential(1).replace("-", MINUS)} %`;
}
