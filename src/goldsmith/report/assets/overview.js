// The run at a glance, its curves, and the recipe with the data accounted for.

const X_NAMES = { step: "step", tokens: "tokens", gold_tokens: "gold tokens" };
const DEPTH = ["depth-1", "depth-2", "depth-3", "depth-4", "depth-5", "depth-6"];

function keyFigure(label, value, note) {
  return el("div", { class: "figure" }, el("dt", {}, label), el("dd", {}, el("span", { class: "value" }, value), note ? el("span", { class: "note" }, note) : null));
}

function arrow(before, after) { return [before, el("span", { class: "to", "aria-label": "to" }, "\u2192"), after]; }

function drawOverview(root, report, state, redraw) {
  const several = report.runs.length > 1;
  for (const run of report.runs) {
    root.append(el("div", { class: "run" }, several ? el("h2", {}, run.name) : null, runFigures(run), runFacts(run)));
  }
  const withSteps = report.runs.filter((run) => run.steps.step.length || run.evaluations.step.length);
  if (!withSteps.length) return;
  const switches = segmented("Horizontal axis", [["step", "Steps"], ["tokens", "Tokens"], ["gold_tokens", "Gold tokens"]],
    state.x, (value) => { state.x = value; redraw(); });
  root.append(el("div", { class: "heading" }, el("h2", {}, "Curves"), switches));
  root.append(nllChart(withSteps, state.x));
  const small = el("div", { class: "charts" });
  for (const run of withSteps) runCharts(run, state.x, several).forEach((chart) => small.append(chart));
  root.append(small);
}

function runFigures(run) {
  const { nll, step } = run.evaluations;
  const result = run.result;
  const figures = [];
  if (nll.length) {
    const best = nll.indexOf(Math.min(...nll.filter((value) => value !== null)));
    figures.push(keyFigure("Held-out nll, nats a token", nll.length > 1 ? arrow(number(nll[0], 3), number(nll.at(-1), 3)) : number(nll[0], 3),
      nll.length > 2 && best !== nll.length - 1 ? `best ${number(nll[best], 3)} at step ${count(step[best])}`
        : nll.length > 1 ? `perplexity ${figure(Math.exp(nll[0]))} \u2192 ${figure(Math.exp(nll.at(-1)))}` : "before the first step"));
  }
  const files = run.data.train?.files ?? [];
  const sum = (key) => files.reduce((total, file) => total + (file[key] ?? 0), 0);
  figures.push(keyFigure("Steps", count(result.steps ?? run.num_steps),
    `${run.is_finished ? "finished" : "not finished"}${result.stopped_early ? ", stopped early" : ""}, ${duration(result.seconds ?? run.seconds)}`));
  if (run.tokens_per_second) figures.push(keyFigure("Tokens a second", compact(run.tokens_per_second), run.peak_memory_bytes ? `peak memory ${number(run.peak_memory_bytes / 2 ** 30, 2)} GiB` : null));
  if (files.length) figures.push(keyFigure("Rows trained on", count(sum("used")), sum("used") === sum("rows_in") ? `all of the data, ${compact(sum("gold_tokens"))} gold tokens` : `of ${count(sum("rows_in"))}, ${compact(sum("gold_tokens"))} gold tokens`));
  return el("dl", { class: "figures" }, figures);
}

function runFacts(run) {
  const facts = [...Object.entries(run.glance)];
  const machine = run.environment;
  if (machine.device) facts.push(["hardware", [machine.device, machine.ranks > 1 ? `${machine.ranks} processes` : null, machine.threads ? `${machine.threads} ${machine.threads === 1 ? "thread" : "threads"}` : null].filter(Boolean).join(" · ")]);
  if (machine.torch) facts.push(["software", `goldsmith ${machine.goldsmith} · torch ${machine.torch} · transformers ${machine.transformers}`]);
  facts.push(["folder", run.folder]);
  return el("dl", { class: "facts" }, facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, visible(String(value))))));
}

// Evaluations and steps of every run over one axis.
function nllChart(runs, x) {
  const xs = [...new Set(runs.flatMap((run) => [...run.steps[x], ...run.evaluations[x]]))].filter((value) => value !== null).sort((a, b) => a - b);
  const place = new Map(xs.map((value, index) => [value, index]));
  const spread = (at, values) => {
    const out = new Array(xs.length).fill(null);
    at.forEach((value, index) => { if (value !== null) out[place.get(value)] = values[index]; });
    return out;
  };
  const several = runs.length > 1;
  const series = runs.flatMap((run, index) => {
    const name = several ? `${run.name}: ` : "";
    const own = several ? colour(DEPTH[index % DEPTH.length]) : null;
    return [
      { label: `${name}training`, values: spread(run.steps[x], run.steps.nll), colour: own ?? colour("series-soft"), width: several ? 1 : 1.25 },
      { label: `${name}held-out`, values: spread(run.evaluations[x], run.evaluations.nll), colour: own ?? colour("accent-strong"), width: 1.5, dash: [3, 4], points: true },
    ].filter((one) => one.values.some((value) => value !== null));
  });
  const stretch = Math.max(...runs.map((run) => run.steps.stretch));
  return lineChart({
    title: "Negative log-likelihood", note: `nats a gold token${stretch > 1 ? `; each training point is the mean of ${stretch} steps` : ""}`,
    xs, xLabel: X_NAMES[x], series, height: 320, properties: { class: "chart large" },
  });
}

function runCharts(run, x, several) {
  const { steps, update_to_weight: ratio, evaluations } = run;
  const prefix = several ? `${run.name}: ` : "";
  const one = (title, note, key, more) => lineChart({
    title: prefix + title, note, xs: steps[x], xLabel: X_NAMES[x],
    series: [{ label: title.toLowerCase(), values: steps[key], colour: colour("series-1") }], ...more,
  });
  const out = [];
  if (steps.step.length) {
    out.push(one("Learning rate", "", "learning_rate"));
    out.push(one("Gradient norm", "before clipping, log scale", "grad_norm", { log: true }));
  }
  const groups = Object.entries(ratio.groups);
  if (groups.length) {
    out.push(lineChart({
      title: `${prefix}Update-to-weight ratio`, note: "norm of an update over norm of the weights, by layer group, log scale",
      xs: ratio[x], xLabel: X_NAMES[x], log: true,
      series: groups.map(([label, values], index) => ({ label, values, colour: colour(DEPTH[Math.min(DEPTH.length - 1, Math.floor((index / groups.length) * DEPTH.length))]), dash: groups.length > DEPTH.length && index % 2 ? [5, 3] : undefined })),
    }));
  }
  for (const [title, columns] of [["Training nll by source", steps], ["Held-out nll by source", evaluations]]) {
    const sources = Object.entries(columns.nll_by_source);
    if (!sources.length) continue;
    out.push(lineChart({
      title: prefix + title, note: "nats a gold token", xs: columns[x], xLabel: X_NAMES[x],
      series: sources.map(([label, values], index) => ({ label, values, colour: colour(DEPTH[index % DEPTH.length]), points: columns === evaluations })),
    }));
  }
  if (steps.step.length) out.push(one("Tokens a second", "", "tokens_per_second"));
  return out;
}

function drawRecipe(root, report) {
  for (const run of report.runs) {
    if (report.runs.length > 1) root.append(el("h2", {}, run.name));
    for (const [split, { files, rejections }] of Object.entries(run.data)) {
      const rejected = (file) => Object.values(file.rejected ?? {}).reduce((total, value) => total + value, 0);
      root.append(table(`Data accounted for: ${split}`, ["File", "Rows in", "Used", "Rejected", "Over the limit", "Examples", "Tokens", "Gold tokens"],
        files.map((file) => [visible(file.name && file.name !== file.path ? `${file.name} (${file.path})` : file.path),
          count(file.rows_in), count(file.used), count(rejected(file)), count(file.over_limit), count(file.examples), count(file.tokens), count(file.gold_tokens)]),
        { class: "numbers" }));
      const reasons = Object.entries(rejections ?? {});
      if (reasons.length) root.append(el("ul", { class: "reasons" }, reasons.map(([reason, places]) => el("li", {}, visible(`${reason}: ${[places].flat().join(", ")}`)))));
    }
    root.append(el("h3", {}, "Resolved recipe"), el("pre", { class: "code", tabindex: "0", role: "region", "aria-label": "Resolved recipe" }, visible(run.recipe)));
  }
}
