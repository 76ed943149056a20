"use strict";
// The packed data, read back. The writer, with the layout and the codes, is report/payload.py.

async function inflate(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// Five digits of base 85 for each four bytes, after the number of bytes and a space: report/page.py writes it.
function bytesOfText(text) {
  const values = new Uint8Array(128);
  let value = 0;
  for (let code = 33; code < 127; code++) if (!"<&>\"'`\\{}".includes(String.fromCharCode(code))) values[code] = value++;
  let at = text.indexOf(" ");
  const bytes = new Uint8Array(Number(text.slice(0, at)));
  const digit = () => values[text.charCodeAt(++at)];
  for (let byte = 0; byte < bytes.length; byte += 4) {
    const word = digit() + 85 * digit() + 7225 * digit() + 614125 * digit() + 52200625 * digit();
    for (let part = 0; part < 4 && byte + part < bytes.length; part++) bytes[byte + part] = Math.floor(word / 256 ** part);
  }
  return bytes;
}

function unpack(bytes) {
  const length = new DataView(bytes.buffer).getUint32(0, true);
  const report = JSON.parse(new TextDecoder().decode(bytes.subarray(4, 4 + length)));
  let place = 4 + length;
  const columns = report.columns.map(([count, width]) => {
    const values = new Uint32Array(count);
    for (let plane = 0; plane < width; plane++, place += count) {
      const factor = 2 ** (8 * plane);
      for (let i = 0; i < count; i++) values[i] += bytes[place + i] * factor;
    }
    return values;
  });
  report.sides.forEach((side) => {
    for (const [name, index] of Object.entries(side.columns)) {
      side.columns[name] = Array.isArray(index) ? index.map((one) => columns[one]) : columns[index];
    }
  });
  return new Report(report);
}

// Everything the page shows. Examples are numbers from 0, sides too.
class Report {
  constructor(values) {
    Object.assign(this, values);
    this.ids = this.examples.id;
    // Names are shown in many places: what cannot be seen in them is made visible once, here.
    for (const named of [...this.runs, ...this.sides]) named.name = oneLine(named.name, 80);
    this.sides.forEach((side, index) => {
      side.start = []; // of each example, among all tokens of the side
      side.goldStart = []; // of each example whose gold column is the side's own
      let start = 0, goldStart = 0;
      side.num_tokens.forEach((count, example) => {
        side.start.push(start);
        side.goldStart.push(goldStart);
        start += count;
        if (side.gold_from[example] === index) goldStart += count;
      });
    });
    this.searchTexts = [];
  }

  numTokens(side, example) { return this.sides[side].num_tokens[example]; }

  hasTokens(side) { return this.sides[side].num_tokens.some((count) => count > 0); }

  // Whether the gold of an example is cut into the same tokens on two sides.
  sameTokens(a, b, example) {
    return this.numTokens(a, example) > 0 && this.numTokens(a, example) === this.numTokens(b, example)
      && this.sides[a].gold_from[example] === this.sides[b].gold_from[example];
  }

  goldEntry(side, example, token) {
    const from = this.sides[this.sides[side].gold_from[example]];
    return from.columns.gold[from.goldStart[example] + token];
  }

  tokenText(side, example, token) { return this.texts[this.goldEntry(side, example, token)]; }

  tokenLogProb(side, example, token) {
    const one = this.sides[side];
    return -one.columns.log_prob[one.start[example] + token] / this.steps_a_nat.log_prob;
  }

  token(side, example, token) {
    const { columns, start } = this.sides[side];
    const steps = this.steps_a_nat;
    const at = start[example] + token;
    const entry = this.goldEntry(side, example, token);
    const logProb = this.tokenLogProb(side, example, token);
    const known = (column) => column && column[at] > 0;
    const best = known(columns.best) ? logProb + (columns.best[at] - 1) / steps.log_prob : null;
    const alternatives = [];
    let gap = 0;
    columns.alternatives.forEach((codes, slot) => {
      if (codes[at] === 0) return;
      gap += columns.gaps[slot][at];
      const isGold = codes[at] === 1;
      const own = isGold ? entry : codes[at] - 2;
      alternatives.push({
        text: this.texts[own], tokenId: this.token_ids[own], isGold,
        logProb: isGold ? logProb : Math.min(0, best - gap / steps.alternative),
      });
    });
    return {
      text: this.texts[entry], tokenId: this.token_ids[entry], logProb, best, alternatives,
      weight: columns.weight ? columns.weight[at] / 1000 : 1,
      rank: known(columns.rank) ? columns.rank[at] : null,
      entropy: known(columns.entropy) ? (columns.entropy[at] - 1) / steps.entropy : null,
    };
  }

  worstLogProb(side, example) {
    let worst = 0;
    for (let token = 0; token < this.numTokens(side, example); token++) {
      worst = Math.min(worst, this.tokenLogProb(side, example, token));
    }
    return worst;
  }

  goldText(example) {
    const side = this.sides.findIndex((one) => one.num_tokens[example] > 0);
    if (side < 0) return "";
    const parts = [];
    for (let token = 0; token < this.numTokens(side, example); token++) parts.push(this.tokenText(side, example, token));
    return parts.join("");
  }

  // Lower case: id, source, context and gold.
  searchText(example) {
    this.searchTexts[example] ??= [
      this.ids[example], this.examples.source[example], this.examples.context[example] ?? "", this.goldText(example),
    ].join("\n").toLowerCase();
    return this.searchTexts[example];
  }

  // log P under side b minus that under side a; null where one is unknown.
  change(a, b, example) {
    const [before, after] = [this.sides[a].log_prob[example], this.sides[b].log_prob[example]];
    return before === null || after === null ? null : after - before;
  }

  pair(a, b) {
    const forward = this.pairs.find(({ sides }) => sides[0] === a && sides[1] === b);
    if (forward) return forward;
    const back = this.pairs.find(({ sides }) => sides[0] === b && sides[1] === a);
    if (!back || !back.mean) return back ?? null;
    const { estimate, low, high, confidence } = back.mean;
    const negated = { estimate: -estimate, low: high === null ? null : -high, high: low === null ? null : -low, confidence };
    return { ...back, sides: [a, b], mean: negated, higher: back.lower, lower: back.higher };
  }
}
