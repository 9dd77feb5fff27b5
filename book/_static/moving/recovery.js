// What came back of docs-lm's damage: methods beside each other, and labels against more tokens.

moving.figure("recovery", (study) => {
  const { drawing, el, linear, percent, slider, svg, text } = moving;
  const state = { view: "methods", bits: "2", first: "Learned, teacher", second: "GPTQ", budget: 3 };
  const colour = (method) =>
    method.endsWith("teacher") ? "var(--mv-emerald)" : method.endsWith("labels") ? "var(--mv-brick)" : "var(--mv-night)";
  const rows = () => [...study.shares[state.bits]].sort((a, b) => b.share[0] - a.share[0]);
  const row = (method) => rows().find((r) => r.method === method);
  const interval = ([value, low, high]) => `${percent(value)} [${percent(low)}, ${percent(high)}]`;
  const nats = (x) => moving.minus(x.toFixed(3));

  const methods = drawing(
    () => `Share of the damage recovered at ${state.bits} bits: `
      + rows().map((r) => `${r.method} ${interval(r.share)}`).join("; "),
    (width) => {
      const narrow = width < 560, left = narrow ? 4 : 150, right = width - (narrow ? 12 : 130);
      const tall = narrow ? 48 : 38, top = 6, all = rows(), base = top + all.length * tall;
      const x = linear([0, 1], [left, right]), content = [];
      const [, low, high] = row(state.second).share;
      content.push(svg("rect", { x: x(low), width: x(high) - x(low), y: top, height: base - top, fill: "var(--mv-pale)" }));
      for (const share of [0, 0.25, 0.5, 0.75, 1])
        content.push(svg("line", { x1: x(share), x2: x(share), y1: top, y2: base, class: "axis" }),
                     text(x(share), base + 18, percent(share), { "text-anchor": share === 0 && narrow ? "start" : share === 1 && narrow ? "end" : "middle" }));
      all.forEach((r, i) => {
        const picked = r.method === state.first || r.method === state.second;
        const y = top + i * tall + (narrow ? 32 : tall / 2);
        const [value, from, to] = r.share, shade = { opacity: picked ? 1 : 0.55 };
        const words = { class: picked ? "strong" : "" };
        content.push(narrow ? text(left, y - 14, r.method, words) : text(left - 12, y + 5, r.method, { ...words, "text-anchor": "end" }));
        content.push(text(narrow ? right + 8 : width, narrow ? y - 14 : y + 5, interval(r.share), { ...words, "text-anchor": "end" }));
        const stroke = { fill: "none", stroke: colour(r.method), "stroke-width": picked ? 3 : 2, ...shade };
        content.push(svg("path", { d: `M${x(from)} ${y - 7}v14m0 -7H${x(to)}m0 -7v14`, ...stroke }),
                     svg("circle", { cx: x(value), cy: y, r: picked ? 5.5 : 4, fill: colour(r.method), ...shade }),
                     svg("rect", { x: 0, width, y: top + i * tall, height: tall, fill: "transparent", "data-method": r.method }));
      });
      return { height: base + 26, content };
    },
  );
  methods.node.style.cursor = "pointer";
  methods.node.addEventListener("click", (event) => {
    const { method } = event.target.dataset ?? {};
    if (method && method !== state.second) { state.first = method; update(); }
  });

  const lines = () => Object.entries(study.curves[state.bits] ?? {});
  const budgets = () => lines()[0][1].map(([tokens]) => tokens);
  const tokens = drawing(
    () => `Share of the damage recovered at ${state.bits} bits against tokens trained. `
      + lines().map(([name, points]) => `${name}: ${points.map(([, share]) => percent(share)).join(", ")}`).join(". "),
    (width) => {
      const left = 44, right = width - 14, top = 12, base = 262, content = [];
      const x = linear([0, 250_000], [left, right]), y = linear([0, 1], [base, top]);
      for (const share of [0, 0.25, 0.5, 0.75, 1])
        content.push(svg("line", { x1: left, x2: right, y1: y(share), y2: y(share), class: "axis" }),
                     text(left - 8, y(share) + 4, percent(share), { "text-anchor": "end" }));
      for (const thousand of [0, 50, 100, 150, 200, 250])
        content.push(text(x(1000 * thousand), base + 20, `${thousand}k`, { "text-anchor": thousand === 250 ? "end" : "middle" }));
      for (const [name, points] of lines()) {
        const stroke = name.startsWith("torchao") ? "var(--mv-night)" : "var(--mv-brick)";
        content.push(svg("path", { d: points.map(([t, s], i) => `${i ? "L" : "M"}${x(t)} ${y(s)}`).join(""), fill: "none", stroke, "stroke-width": 3, "stroke-linejoin": "round" }));
        points.forEach(([t, s], i) => content.push(svg("circle", {
          cx: x(t), cy: y(s), r: i === state.budget ? 9 : 5, fill: stroke, stroke: "var(--mv-card)", "stroke-width": 2 })));
        const [t, s] = points.at(-1);
        content.push(text(x(t), y(s) + 26, name, { "text-anchor": "end", style: `fill: ${stroke}; font-weight: 600` }));
      }
      const taught = row("Learned, teacher").share[0], at = x(study.tokens);
      content.push(svg("path", { d: `M${at} ${y(taught) - 9}l8 9-8 9-8-9z`, fill: "var(--mv-emerald)", stroke: "var(--mv-card)", "stroke-width": 2 }),
                   text(at + 2, y(taught) - 14, "Learned, teacher", { "text-anchor": "middle", style: "fill: var(--mv-emerald); font-weight: 600" }));
      return { height: base + 28, content };
    },
  );

  const view = moving.choice({
    label: "View", value: state.view, options: [["methods", "methods"], ["tokens", "tokens trained"]],
    change: (now) => {
      state.view = now;
      if (!study.curves[state.bits]) { state.bits = "2"; bits.set("2"); }
      update();
    },
  });
  const bits = moving.choice({
    label: "Bits, in groups of 32", value: state.bits,
    options: Object.keys(study.shares).sort((a, b) => b - a).map((b) => [b, b]),
    change: (now) => { state.bits = now; update(); },
  });
  const budget = slider({
    label: "Tokens trained", min: 0, max: budgets().length - 1, value: state.budget,
    say: (i) => lines().map(([, points]) => points[i][0].toLocaleString("en")).filter((t, i, all) => all.indexOf(t) === i).join(" and "),
    change: (i) => { state.budget = i; update(); },
  });
  const picker = (label, which) => {
    const id = `moving-recovery-${which}`;
    const select = el("select", { id, onchange: () => { state[which] = select.value; update(); } });
    return { select, node: el("div", { class: "mv-select" }, el("label", { for: id }, label), select) };
  };
  const first = picker("Compare", "first"), second = picker("with", "second");
  const pickers = el("div", { class: "mv-controls" }, first.node, second.node);
  const report = moving.report();

  const sentence = (method) => {
    const { share, time } = row(method);
    const added = method.includes("labels") || method.includes("teacher") ? "the time of the float control in all" : "that time, after it";
    return `${method} took back ${interval(share)}${time ? `, in ${time.toFixed(2)} times ${added}` : ""}.`;
  };

  function compared() {
    const own = new Set([state.first, state.second]);
    if (own.size === 1) return sentence(state.first);
    const verdict = study.verdicts.find((v) => String(v.bits) === state.bits && v.pair.every((m) => own.has(m)));
    const both = `${sentence(state.first)} ${sentence(state.second)}`;
    if (!verdict) return `${both} This pair was not among the announced comparisons.`;
    const [value, low, high] = verdict.nats;
    const spread = `${nats(value)} nats a token [${nats(low)}, ${nats(high)}]`;
    return verdict.verdict === "tie"
      ? `${both} As announced and judged beforehand, a tie: ${verdict.pair[0]} ahead of ${verdict.pair[1]} by ${spread}.`
      : `${both} As announced: ${verdict.pair[0]} is ahead of ${verdict.pair[1]} by ${spread}.`;
  }

  const trained = () => lines().map(([name, points]) => {
    const [count, share] = points[state.budget];
    return `${name}: ${percent(share)} after ${count.toLocaleString("en")} tokens.`;
  }).join(" ") + ` With a teacher, ${study.tokens.toLocaleString("en")} tokens took back ${percent(row("Learned, teacher").share[0])}.`;

  function update() {
    const inMethods = state.view === "methods";
    const names = rows().map((r) => r.method);
    for (const [which, { select }] of [["first", first], ["second", second]]) {
      if (!names.includes(state[which])) state[which] = which === "first" ? "Learned, teacher" : "GPTQ";
      select.replaceChildren(...names.map((name) => el("option", { value: name, selected: name === state[which] }, name)));
    }
    bits.allow(Object.keys(inMethods ? study.shares : study.curves));
    methods.node.hidden = pickers.hidden = key.hidden = !inMethods;
    tokens.node.hidden = budget.node.hidden = note.hidden = inMethods;
    methods.again();
    if (!inMethods) tokens.again();
    const lost = `At ${state.bits} bits rounding to nearest costs ${study.damage[state.bits].map(nats)[0]} nats a token. `;
    report.say(lost + (inMethods ? compared() : trained()));
  }

  const colours = [["night", "rounded after training"], ["brick", "trained under rounding, with labels"],
                   ["emerald", "trained under rounding, with a teacher"], ["pale", "interval of the one compared with"]];
  const key = el("ul", { class: "mv-key" }, colours.map(([c, words]) =>
    el("li", {}, el("i", { style: `background: var(--mv-${c})` }), words)));
  const note = el("p", { class: "mv-small" }, "Labels only, one draw of the text; the diamond is the arm with a teacher, three draws.");
  const parts = [el("div", { class: "mv-controls" }, view.node, bits.node), pickers, methods.node, key,
                 tokens.node, note, budget.node, report.node];
  update();
  return parts;
});
