// What ties the page together: its sections, the theme, and newer data while a run is served live.

const SECTIONS = {
  overview: ["Overview", (report) => report.runs.length > 0, drawOverview],
  gold: ["Gold", (report) => report.ids.length > 0, drawGold],
  compare: ["Compare", (report) => report.sides.length > 1, drawCompare],
  calibration: ["Calibration", (report) => report.sides.some((_, side) => report.hasTokens(side)), drawCalibration],
  recipe: ["Recipe", (report) => report.runs.length > 0, drawRecipe],
};

const LIVE_SECONDS = 3;

function startTheme(redraw) {
  const button = document.getElementById("theme"), root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  let own = null;
  try { own = localStorage.getItem("goldsmith-theme"); } catch { /* a browser that keeps nothing for files */ }
  const apply = () => {
    const theme = own ?? (system.matches ? "dark" : "light");
    root.dataset.theme = theme;
    button.setAttribute("aria-pressed", String(theme === "dark"));
    button.textContent = theme === "dark" ? "\u2600" : "\u263E";
  };
  button.addEventListener("click", () => {
    own = root.dataset.theme === "dark" ? "light" : "dark";
    try { localStorage.setItem("goldsmith-theme", own); } catch { /* as above */ }
    apply();
    redraw();
  });
  system.addEventListener("change", () => { apply(); redraw(); });
  apply();
}

function subtitleOf(report) {
  const parts = [];
  if (report.runs.length === 1) {
    const [run] = report.runs;
    parts.push(run.glance.model ?? "", run.is_finished ? "finished run" : "run in progress");
  } else if (report.runs.length) parts.push(`${report.runs.length} runs`);
  if (report.num_examples) parts.push(`${count(report.num_examples)} scored ${report.num_examples === 1 ? "example" : "examples"}`);
  return parts.filter(Boolean).join(" \u00B7 ");
}

async function start() {
  const state = { a: 0, b: 0, x: "step", sort: "file", query: "", source: "", page: 0, view: "both", range: null, only: null, point: null, section: "" };
  const block = document.getElementById("payload");
  let report = unpack(await inflate(bytesOfText(block.textContent)));
  block.remove();
  const open = (name) => SECTIONS[name]?.[1](report);
  // The address names the section; any other anchor (the skip link's) leaves it as it is.
  const current = () => {
    if (open(location.hash.slice(1))) state.section = location.hash.slice(1);
    return open(state.section) ? state.section : Object.keys(SECTIONS).find(open) ?? "overview";
  };

  document.getElementById("title").textContent = oneLine(report.title, 200);
  const adopt = () => {
    const last = report.sides.length - 1;
    if (state.only && state.only.example >= report.ids.length) state.only = null;
    if (state.b > last || state.a > last || (last > 0 && state.a === state.b)) { state.a = 0; state.b = Math.max(0, Math.min(1, last)); }
    if (matchMedia("(max-width: 640px)").matches && !state.adopted) state.view = "b";
    state.adopted = true;
    document.getElementById("subtitle").textContent = subtitleOf(report);
  };
  const draw = () => {
    forgetCharts();
    hideHint();
    const name = current();
    document.getElementById("sections").replaceChildren(...Object.entries(SECTIONS).filter(([one]) => open(one)).map(([one, [text]]) =>
      el("li", {}, el("a", { href: `#${one}`, "aria-current": one === name ? "page" : null }, text))));
    for (const one of Object.keys(SECTIONS)) {
      const section = document.getElementById(one);
      section.replaceChildren();
      section.hidden = one !== name;
    }
    if (!open(name)) { document.getElementById("subtitle").textContent = "Nothing to show yet."; return; }
    SECTIONS[name][2](document.getElementById(name), report, state, redraw);
  };
  // Drawn anew, with the control that had the focus keeping it.
  const redraw = () => {
    const focused = document.activeElement?.id;
    draw();
    if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
  };

  startTheme(() => redraw());
  watchTokens(() => report);
  addEventListener("hashchange", () => { if (open(location.hash.slice(1))) { draw(); scrollTo(0, 0); if (current() === "gold") focusAwaited(state); } });
  addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select, textarea")) return;
    const search = document.getElementById("search");
    if (search) { event.preventDefault(); search.focus(); }
  });
  adopt();
  draw();
  document.documentElement.dataset.ready = "yes";

  if (document.documentElement.dataset.live === "yes") {
    let tag = null;
    setInterval(async () => {
      try {
        const answer = await fetch("payload", { cache: "no-cache" });
        const newer = answer.headers.get("ETag");
        if (!answer.ok || newer === tag) return;
        tag = newer;
        report = unpack(await inflate(await answer.arrayBuffer()));
        adopt();
        // Reading the gold is not disturbed: its data is the same until the run ends.
        if (!document.activeElement?.matches(".t, #search")) { const top = scrollY; redraw(); scrollTo(0, top); }
        document.documentElement.dataset.updates = String(Number(document.documentElement.dataset.updates ?? 0) + 1);
      } catch { /* the server has ended, or is busy: asked again */ }
    }, LIVE_SECONDS * 1000);
  }
}

start().catch((error) => {
  document.getElementById("subtitle").textContent = `This page could not be drawn: ${error.message}`;
  throw error;
});
