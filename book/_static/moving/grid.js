// Bits, group size and clipping, tried on three rows of SmolLM2. The arithmetic is that of
// companion.choose_scale and companion.quantize, in float32 and with scales in float16, to the last bit.

const grid = (() => {
  const float = Math.fround;
  const SMALLEST = 2 ** -23; // of a scale: an all-zero group still needs a divisor

  /** Round to the nearest integer, a half to the even one. */
  const toEven = (x) => {
    const low = Math.floor(x), rest = x - low;
    return rest > 0.5 || (rest === 0.5 && low % 2 !== 0) ? low + 1 : low;
  };

  /** Round a positive number to float16: eleven significant bits, and a smallest exponent. */
  const half = (x) => {
    const unit = 2 ** (Math.max(Math.floor(Math.log2(x)), -14) - 10);
    return toEven(x / unit) * unit;
  };

  const largest = (weights) => weights.reduce((most, w) => Math.max(most, Math.abs(w)), 0);

  /** The scale of one group whose range is `percent` of its largest weight. */
  const chooseScale = (weights, bits, percent) => {
    const limit = float(float(percent / 100) * largest(weights));
    return half(Math.max(float(limit / ((2 ** bits - 1) / 2)), SMALLEST));
  };

  /** Integers of one group, and which of them the ends of the grid cut off. */
  const quantize = (weights, scale, bits) => {
    const low = -(2 ** (bits - 1)), high = 2 ** (bits - 1) - 1, inverse = float(1 / scale);
    const rounded = Array.from(weights, (w) => toEven(float(w * inverse)));
    const integers = rounded.map((q) => Math.min(Math.max(q, low), high));
    return { integers, cut: rounded.map((q, i) => q !== integers[i]) };
  };

  /** All groups of a row. */
  const roundRow = (weights, bits, size, percent) => {
    const groups = [];
    for (let start = 0; start < weights.length; start += size) {
      const part = weights.subarray(start, start + size);
      const scale = chooseScale(part, bits, percent);
      const { integers, cut } = quantize(part, scale, bits);
      const values = integers.map((q) => float(q * scale));
      groups.push({ weights: part, scale, integers, cut, values, error: error(part, values) });
    }
    return groups;
  };

  /** Root of the mean squared error over that of the weights themselves. */
  const error = (weights, values) => {
    let wrong = 0, all = 0;
    weights.forEach((w, i) => { wrong += (w - values[i]) ** 2; all += w ** 2; });
    return all ? Math.sqrt(wrong / all) : 0;
  };

  const decode = (text) =>
    new Float32Array(Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer);

  return { decode, error, roundRow };
})();

moving.figure("grid", ({ columns, rows }) => {
  const { drawing, el, linear, percent, slider, svg, text } = moving;
  const SIZES = [columns, 128, 64, 32, 16];
  const weights = rows.map((row) => grid.decode(row.weights));
  const state = { row: rows.length - 1, bits: 4, size: 0, clip: 100, group: 0 };
  let groups = [];

  const sizeName = (index) => (index ? `${SIZES[index]} weights` : `whole row (${columns})`);
  const count = () => columns / SIZES[state.size];
  const nameOf = (row, index) => (index === rows.length - 1 ? `row ${row.row}, with a giant` : `row ${row.row}`);

  const rowChoice = moving.choice({
    label: "Row of the layer", value: state.row, options: rows.map((row, i) => [i, nameOf(row, i)]),
    change: (row) => { state.row = row; toGiant(); update(); },
  });
  const controls = [
    slider({ label: "Bits", min: 2, max: 8, value: state.bits, say: (b) => `${b} bits`,
             change: (bits) => { state.bits = bits; update(); } }),
    slider({ label: "Group size", min: 0, max: SIZES.length - 1, value: state.size, say: sizeName,
             change: (size) => { state.size = size; toGiant(); update(); } }),
    slider({ label: "Range, of the largest weight", min: 20, max: 100, value: state.clip,
             say: (p) => `${p}%`, change: (clip) => { state.clip = clip; update(); } }),
  ];
  const which = slider({
    label: "Group that is drawn", min: 1, max: 1, value: 1, say: (n) => `${n} of ${count()}`,
    change: (n) => { state.group = n - 1; update(); },
  });

  /** Show the group of the largest weight first: there is most to see. */
  function toGiant() {
    const all = weights[state.row];
    const place = all.reduce((best, w, i) => (Math.abs(w) > Math.abs(all[best]) ? i : best), 0);
    state.group = Math.floor(place / SIZES[state.size]);
    which.set(state.group + 1, count());
  }

  const histogram = drawing(
    () => `Histogram of the row's weights over the ${2 ** state.bits} levels of the chosen group's grid.`,
    (width) => {
      const { weights: own, scale, values, cut } = groups[state.group];
      const low = -(2 ** (state.bits - 1)), high = -low - 1;
      const end = 1.06 * Math.max(...own.map(Math.abs), -low * scale);
      const x = linear([-end, end], [1, width - 1]);
      const top = 8, base = 178, foot = base + 46;
      const bins = new Array(Math.floor(width / 7)).fill(0);
      for (const w of weights[state.row]) {
        const bin = Math.floor(((w + end) / (2 * end)) * bins.length);
        if (bin >= 0 && bin < bins.length) bins[bin] += 1;
      }
      // a square root keeps the lonely ones in sight
      const tall = linear([0, Math.sqrt(Math.max(...bins))], [0, base - top - 14]);
      const bars = bins.map((n, i) => n && svg("rect", {
        x: (i * width) / bins.length + 0.5, width: width / bins.length - 1, y: base - tall(Math.sqrt(n)),
        height: tall(Math.sqrt(n)), rx: 1.5, fill: "var(--mv-wheat)",
      })).filter(Boolean);
      const edges = [[0, x((low - 0.5) * scale)], [x((high + 0.5) * scale), width]];
      const zones = edges.map(([from, to]) => to > from && svg("rect", {
        x: from, width: to - from, y: top, height: foot - top, fill: "var(--mv-blush)",
      })).filter(Boolean);
      const thin = Math.min(2, Math.max(0.5, (x(scale) - x(0)) / 6));
      const levels = [];
      for (let q = low; q <= high; q += 1)
        levels.push(svg("line", { x1: x(q * scale), x2: x(q * scale), y1: top + 10, y2: foot,
                                  stroke: "var(--mv-night)", "stroke-width": thin, "stroke-opacity": 0.75 }));
      // one path for all that are kept and one for all that are cut off; what coincides is drawn once
      const threads = [false, true].map((isCut) => {
        const lines = [...own].map((w, i) =>
          cut[i] === isCut && `M${x(w).toFixed(1)} ${base + 1}L${x(values[i]).toFixed(1)} ${foot}`);
        return svg("path", {
          d: [...new Set(lines)].filter(Boolean).join(""), fill: "none",
          stroke: isCut ? "var(--mv-slipper)" : "var(--mv-brick)",
          "stroke-width": isCut ? 2 : 1.2, "stroke-opacity": own.length > 200 ? 0.6 : 0.9,
        });
      });
      const ticks = [-end / 1.06, 0, end / 1.06].map((v, i) =>
        text(x(v), foot + 17, moving.minus(v.toPrecision(2).replace(/^0\.0+$/, "0")),
             { "text-anchor": ["start", "middle", "end"][i] }));
      return { height: foot + 22, content: [
        ...zones, ...bars, ...levels, svg("line", { x1: 0, x2: width, y1: base, y2: base, class: "axis" }),
        ...threads, ...ticks] };
    },
  );

  const ladder = drawing(
    () => `Step of each of the ${count()} groups along the row.`,
    (width) => {
      const height = 64, most = Math.max(...groups.map((g) => g.scale));
      const x = linear([0, groups.length], [0, width]), y = linear([0, most], [0, height - 4]);
      const gap = groups.length > 60 ? 0.6 : 1.5;
      const bars = groups.map((g, i) => svg("rect", {
        x: x(i) + gap / 2, width: Math.max(1, x(i + 1) - x(i) - gap), y: height - y(g.scale),
        height: y(g.scale), rx: 1.5, fill: i === state.group ? "var(--mv-brick)" : "var(--mv-wheat)",
      }));
      const mark = svg("path", {
        d: `M${(x(state.group) + x(state.group + 1)) / 2} ${height + 3}l5 8h-10z`, fill: "var(--mv-brick)" });
      return { height: height + 12, content: [...bars, mark] };
    },
  );
  ladder.node.addEventListener("click", (event) => {
    const box = ladder.node.getBoundingClientRect();
    const place = Math.floor(((event.clientX - box.left) / box.width) * count());
    state.group = Math.min(Math.max(place, 0), count() - 1);
    which.set(state.group + 1);
    update();
  });
  ladder.node.style.cursor = "pointer";

  const ofRow = moving.tile("error of the row, relative (RMS)"), ofGroup = moving.tile("error of the drawn group");
  const bytes = moving.tile("bytes a weight, with its share of a scale"), zeros = moving.tile("weights of the row that become zero");
  const report = moving.report();

  function update() {
    const size = SIZES[state.size], row = weights[state.row];
    groups = grid.roundRow(row, state.bits, size, state.clip);
    const whole = grid.error(row, groups.flatMap((g) => g.values));
    const none = groups.flatMap((g) => g.integers).filter((q) => q === 0).length;
    const cut = groups.flatMap((g) => g.cut).filter(Boolean).length;
    ofRow.set(percent(whole, 1));
    ofGroup.set(percent(groups[state.group].error, 1));
    bytes.set(((state.bits + 16 / size) / 8).toFixed(3));
    zeros.set(`${none} of ${columns}`);
    report.say(`${state.bits} bits, ${state.size ? `groups of ${size}` : "one scale for the row"}, range ${state.clip}%: `
      + `rounding moves the row by ${percent(whole, 1)}, and the ends of the grid cut off ${cut} of its ${columns} weights.`);
    strip.hidden = !state.size;
    histogram.again();
    ladder.again();
  }
  const strip = el("div", {},
    el("p", { class: "mv-small" }, "Step of each group along the row; tap one, and it is drawn above."),
    ladder.node, which.node);
  toGiant();
  update();

  const key = [["wheat", "weights of the row (root of how many)"], ["night", "levels of the drawn group"],
               ["brick", "each of its weights, on its way to a level"], ["slipper", "cut off by the end of the grid"]];
  return [
    rowChoice.node,
    el("div", { class: "mv-controls" }, controls.map((c) => c.node)),
    histogram.node,
    el("ul", { class: "mv-key" }, key.map(([colour, words]) =>
      el("li", {}, el("i", { style: `background: var(--mv-${colour})` }), words))),
    strip,
    el("dl", { class: "mv-tiles" }, [ofRow, ofGroup, bytes, zeros].map((t) => t.node)),
    report.node,
  ];
});
