// One hidden weight on the staircase of rounding, and gradient descent with the straight-through
// estimator: chapter 6's own example, with three bits, so that both ends of the grid are near.

const staircase = (() => {
  const float = Math.fround;
  const grid = { scale: 0.5, low: -4, high: 3, target: 1.2, rate: 0.1, start: 0.1 };

  const toEven = (x) => {
    const low = Math.floor(x), rest = x - low;
    return rest > 0.5 || (rest === 0.5 && low % 2 !== 0) ? low + 1 : low;
  };

  /** What a hidden weight becomes, and whether the gradient is let through to it. */
  const round = (w) => {
    const steps = toEven(w / grid.scale);
    const integer = Math.min(Math.max(steps, grid.low), grid.high);
    return { integer, value: integer * grid.scale, inside: steps === integer };
  };

  /** One step of gradient descent on the squared error, in float32 as PyTorch does it. */
  const step = (w, straight = true) => {
    const { value, inside } = round(w);
    const slope = straight && inside ? float(2 * float(value - float(grid.target))) : 0;
    return { slope, next: float(w - float(float(grid.rate) * slope)) };
  };

  return { grid, round, step };
})();

moving.figure("staircase", () => {
  const { drawing, el, linear, minus, slider, svg, text } = moving;
  const { scale, low, high, target, start } = staircase.grid;
  const ENDS = [-3, 2.5], SHOWN = 40, BEAT = 400;
  const state = { w: Math.fround(start), straight: true, trail: [Math.fround(start)], timer: 0 };
  const signed = (x, digits = 2) => minus((Math.abs(x) < 5e-3 ? 0 : x).toFixed(digits));

  const place = (w) => { state.w = Math.fround(w); state.trail = [state.w]; };

  function advance() {
    const before = staircase.round(state.w), { slope, next } = staircase.step(state.w, state.straight);
    const from = state.w;
    state.w = next;
    state.trail.push(next);
    const after = staircase.round(next);
    const count = `Step ${state.trail.length - 1}: `;
    if (!state.straight) return `${count}the true gradient of a step is zero. Nothing moves, whatever the loss.`;
    if (!before.inside) return `${count}the weight lies beyond the grid, so no gradient comes through. It is stuck.`;
    const moved = `${count}the hidden weight moves from ${signed(from)} to ${signed(next)}`;
    return before.integer === after.integer
      ? `${moved}; the network still uses ${signed(after.value, 1)}.`
      : `${moved}, over the edge: what the network uses flips from ${signed(before.value, 1)} to ${signed(after.value, 1)}.`;
  }

  const picture = drawing(
    () => {
      const { value } = staircase.round(state.w);
      return `A staircase of eight levels. The hidden weight ${signed(state.w)} is used as ${signed(value, 1)}; `
        + `below it, the path of the hidden weight over ${state.trail.length - 1} steps.`;
    },
    (width) => {
      const left = 34, right = width - 8, top = 14, base = 222, from = base + 40, row = 5;
      const x = linear(ENDS, [left, right]), y = linear([low * scale - 0.25, high * scale + 0.25], [base, top]);
      const content = [];
      const line = (x1, y1, x2, y2, more) => content.push(svg("line", { x1, y1, x2, y2, ...more }));
      const foot = from + SHOWN * row;
      // beyond the grid: no gradient
      const edges = [(low - 0.5) * scale, (high + 0.5) * scale];
      for (const [a, b] of [[left, x(edges[0])], [x(edges[1]), right]])
        content.push(svg("rect", { x: a, width: b - a, y: top, height: foot - top, fill: "var(--mv-blush)", opacity: 0.65 }));
      // the edges at which the integer flips run through both halves
      for (let q = low; q <= high; q += 1) {
        const at = x((q + 0.5) * scale);
        line(at, top, at, foot, { class: "axis", "stroke-dasharray": "2 4" });
        if (q % 2 === 0 || width > 500)
          content.push(text(left - 6, y(q * scale) + 4, signed(q * scale, 1), { "text-anchor": "end" }));
      }
      line(left, base, right, base, { class: "axis" });
      // what is aimed at, what is pretended, what is used
      line(left, y(target), right, y(target), { stroke: "var(--mv-emerald)", "stroke-width": 2, "stroke-dasharray": "7 5" });
      content.push(text(left + 4, y(target) - 7, `target ${target}`, { style: "fill: var(--mv-emerald); font-weight: 600" }));
      line(x(low * scale), y(low * scale), x(high * scale), y(high * scale),
           { stroke: "var(--mv-muted)", "stroke-width": 1.5, "stroke-dasharray": "1 5", "stroke-linecap": "round" });
      let path = `M${left} ${y(low * scale)}`;
      for (let q = low; q < high; q += 1) path += `H${x((q + 0.5) * scale)}V${y((q + 1) * scale)}`;
      content.push(svg("path", { d: `${path}H${right}`, fill: "none", stroke: "var(--mv-night)", "stroke-width": 3, "stroke-linejoin": "round" }));
      for (const middle of [(left + x(edges[0])) / 2, (x(edges[1]) + right) / 2])
        content.push(text(middle, foot - 10, "clipped", { "text-anchor": "middle", style: "fill: var(--mv-slipper)" }));
      // the path so far, downward
      const shown = state.trail.slice(-SHOWN - 1), first = state.trail.length - shown.length;
      line(x(target), base, x(target), foot, { stroke: "var(--mv-emerald)", "stroke-width": 2, "stroke-dasharray": "7 5" });
      content.push(text(left - 6, from - 14, "step", { "text-anchor": "end" }));
      for (let k = Math.ceil(first / 10) * 10; k <= first + SHOWN; k += 10)
        content.push(text(left - 6, from + (k - first) * row + 4, String(k), { "text-anchor": "end" }));
      content.push(svg("path", {
        d: shown.map((w, i) => `${i ? "L" : "M"}${x(w)} ${from + i * row}`).join(""), fill: "none",
        stroke: "var(--mv-brick)", "stroke-width": 1.5, "stroke-opacity": 0.6,
      }));
      shown.forEach((w, i) => {
        const flipped = i && staircase.round(w).integer !== staircase.round(shown[i - 1]).integer;
        content.push(svg("circle", { cx: x(w), cy: from + i * row, r: flipped ? 4 : 2.4,
                                     fill: flipped ? "var(--mv-slipper)" : "var(--mv-brick)" }));
      });
      // the weight itself: a handle on the axis, and where it comes out on the staircase
      const { value } = staircase.round(state.w), { slope } = staircase.step(state.w, state.straight);
      const at = x(state.w);
      line(at, base, at, y(value), { stroke: "var(--mv-brick)", "stroke-width": 1.5, "stroke-dasharray": "4 3" });
      content.push(svg("circle", { cx: at, cy: y(value), r: 7, fill: "var(--mv-night)", stroke: "var(--mv-card)", "stroke-width": 2 }));
      if (slope) {
        const way = -Math.sign(slope), tip = at + way * 46;
        line(at + way * 18, base, tip - way * 6, base, { stroke: "var(--mv-emerald)", "stroke-width": 4 });
        content.push(svg("path", { d: `M${tip} ${base}l${-way * 10} -7v14z`, fill: "var(--mv-emerald)" }));
      }
      content.push(svg("circle", { cx: at, cy: base, r: 13, fill: "var(--mv-brick)", stroke: "var(--mv-card)", "stroke-width": 3 }),
                   svg("path", { d: `M${at - 3} ${base - 4}l-4 4 4 4M${at + 3} ${base - 4}l4 4-4 4`, fill: "none",
                                 stroke: "var(--mv-card)", "stroke-width": 2 }));
      return { height: foot + 6, content };
    },
  );
  picture.node.classList.add("mv-drag");
  const drag = (event) => {
    const box = picture.node.getBoundingClientRect();
    const back = linear([34, box.width - 8], ENDS);
    stop();
    place(Math.min(Math.max(back(event.clientX - box.left), ENDS[0]), ENDS[1]));
    update();
  };
  picture.node.addEventListener("pointerdown", (event) => {
    if (event.clientY - picture.node.getBoundingClientRect().top > 245) return;
    picture.node.setPointerCapture(event.pointerId);
    drag(event);
  });
  picture.node.addEventListener("pointermove", (event) => {
    if (picture.node.hasPointerCapture(event.pointerId)) drag(event);
  });

  const weight = slider({
    label: "Hidden weight", min: 100 * ENDS[0], max: 100 * ENDS[1], step: 5, value: 100 * start,
    say: () => signed(state.w), change: (hundredths) => { stop(); place(hundredths / 100); update(); },
  });
  const gradient = moving.choice({
    label: "Gradient of the rounding", value: "straight",
    options: [["straight", "straight through"], ["true", "the true one"]],
    change: (which) => { state.straight = which === "straight"; update(); },
  });
  const once = moving.button("One step", () => { stop(); const said = advance(); update(said); });
  once.classList.add("main");
  const play = moving.button("Play", () => {
    if (state.timer) { stop(); return; }
    if (moving.calm()) { // nothing moves by itself: all steps at once
      let said = "";
      for (let i = 0; i < SHOWN; i += 1) said = advance();
      update(said);
      return;
    }
    report.node.setAttribute("aria-live", "off");
    state.timer = setInterval(() => {
      const said = advance();
      update(said);
      if (state.trail.length > SHOWN) stop();
    }, BEAT);
    play.textContent = "Pause";
  });
  const again = moving.button("Start again", () => { stop(); place(start); update(); });

  function stop() {
    clearInterval(state.timer);
    state.timer = 0;
    play.textContent = moving.calm() ? `${SHOWN} steps` : "Play";
    report.node.setAttribute("aria-live", "polite");
  }

  const hidden = moving.tile("hidden weight"), used = moving.tile("what the network uses");
  const loss = moving.tile("loss, squared error"), let_through = moving.tile("gradient that reaches it");
  const report = moving.report();

  function update(said) {
    const { value, inside } = staircase.round(state.w), { slope } = staircase.step(state.w, state.straight);
    hidden.set(signed(state.w));
    used.set(signed(value, 1));
    loss.set(((value - target) ** 2).toFixed(2));
    let_through.set(signed(slope));
    weight.set(Math.round(100 * state.w));
    report.say(said ?? (inside
      ? `The hidden weight ${signed(state.w)} is used as ${signed(value, 1)}. Take a step, or drag it elsewhere.`
      : `The hidden weight ${signed(state.w)} lies beyond the grid and is clipped to ${signed(value, 1)}.`));
    picture.again();
  }
  stop();
  update();

  const key = [["night", "what the network uses"], ["brick", "hidden weight, and its path, step by step downward"],
               ["slipper", "the integer has flipped"], ["emerald", "target, and the push towards it"]];
  return [
    el("div", { class: "mv-controls" }, weight.node, gradient.node),
    el("div", { class: "mv-buttons" }, once, play, again),
    picture.node,
    el("ul", { class: "mv-key" }, key.map(([colour, words]) =>
      el("li", {}, el("i", { style: `background: var(--mv-${colour})` }), words))),
    el("dl", { class: "mv-tiles" }, [hidden, used, loss, let_through].map((t) => t.node)),
    report.node,
  ];
});
