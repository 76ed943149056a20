// Elements and figures. Text of the data goes into text nodes and attributes' values only, never into HTML.

function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "class") element.className = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

const MINUS = "\u2212", NONE = "\u2013";

function number(value, digits = 2) {
  if (value === null || value === undefined || !Number.isFinite(value)) return NONE;
  const text = Math.abs(value).toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
  return value < 0 && Number(text.replaceAll(",", "")) !== 0 ? MINUS + text : text;
}

function count(value) { return value === null || value === undefined ? NONE : Math.round(value).toLocaleString("en"); }

function signed(value, digits = 2) {
  const text = number(value, digits);
  return value > 0 && text !== number(0, digits) ? "+" + text : text;
}

// Three significant digits, for figures of any size.
function figure(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return NONE;
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2).replace("-", MINUS).replace(/e(?:\+)?/, "e");
  return number(value, size >= 100 ? 0 : size >= 10 ? 1 : size >= 1 ? 2 : 4);
}

function percent(probability) {
  if (probability === null || probability === undefined) return NONE;
  const value = probability * 100;
  if (value > 0 && value < 0.01) return "<0.01 %";
  return `${value >= 10 ? value.toFixed(1) : value.toFixed(2)} %`;
}

// Of an alternative, which is kept to two digits.
function roughPercent(probability) {
  const value = probability * 100;
  if (value < 0.01) return "<0.01 %";
  return `${value >= 10 ? Math.round(value) : value >= 1 ? value.toFixed(1) : value.toFixed(2)} %`;
}

function duration(seconds) {
  if (seconds === null || seconds === undefined) return NONE;
  if (seconds < 100) return `${seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 100 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

function compact(value) {
  if (value === null || value === undefined) return NONE;
  return new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 }).format(value);
}

function interval(values, digits = 3) {
  if (!values) return NONE;
  const { estimate, low, high } = values;
  return low === null ? number(estimate, digits) : `${number(estimate, digits)} (${number(low, digits)} to ${number(high, digits)})`;
}

// A token's text with what cannot be seen made visible: control characters as their pictures, and marks that would
// turn the direction of the line by their code.
function visible(text) {
  if (text === "") return "\u25AF";
  return text.replace(/[\u0000-\u0009\u000B-\u001F\u007F-\u009F\u061C\u200B-\u200F\u2028-\u202E\u2060-\u2069\uFEFF]/g, (one) => {
    const code = one.charCodeAt(0);
    if (one === "\t") return "\u21E5\t";
    if (code < 0x20) return String.fromCharCode(0x2400 + code);
    if (code === 0x7F) return "\u2421";
    return `\u27E8${code.toString(16).toUpperCase().padStart(4, "0")}\u27E9`;
  });
}

// On one line, for labels.
function oneLine(text, limit = 60) {
  const line = visible(text).replaceAll("\n", "\u23CE");
  return line.length > limit ? `${line.slice(0, limit)}\u2026 (${count(line.length)} characters)` : line;
}

function segmented(label, options, chosen, onChoose) {
  const group = el("div", { class: "segmented", role: "group", "aria-label": label });
  for (const [value, text] of options) {
    group.append(el("button", {
      type: "button", "aria-pressed": String(value === chosen), "data-value": value,
      onclick: () => {
        for (const button of group.children) button.setAttribute("aria-pressed", String(button.dataset.value === String(value)));
        onChoose(value);
      },
    }, text));
  }
  return group;
}

function select(label, options, chosen, onChoose, properties = {}) {
  const box = el("select", { ...properties, onchange: () => onChoose(box.value) },
    options.map(([value, text]) => el("option", { value, selected: String(value) === String(chosen) }, oneLine(text))));
  return el("label", { class: "field" }, el("span", {}, label), box);
}

function table(caption, head, rows, properties = {}) {
  return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    el("table", properties, el("caption", {}, caption),
      el("thead", {}, el("tr", {}, head.map((cell) => el("th", { scope: "col" }, cell)))),
      el("tbody", {}, rows.map(([first, ...rest]) =>
        el("tr", {}, el("th", { scope: "row" }, first), rest.map((cell) => el("td", {}, cell)))))));
}

function announce(text) { document.getElementById("announce").textContent = text; }
