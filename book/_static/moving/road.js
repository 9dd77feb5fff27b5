// Which road for me: the table of chapter 14, asked for by four or five questions.

moving.figure("road", ({ rows, evidence }) => {
  const { el } = moving;
  const chapters = moving.data("chapters");
  const state = { model: "language", runs: "small", bits: "4", text: "plenty", memory: "enough" };

  const QUESTIONS = [
    ["model", "What do you have?", [["language", "a language model"], ["conv", "a convolutional network"]]],
    ["runs", "Where will it run?", [["small", "in PyTorch; smaller is enough"], ["fast", "where it must be faster"],
                                    ["inputs", "on an engine that rounds inputs to 8 bits, too"]]],
    ["bits", "How many bits?", [["8", "8"], ["4", "4"], ["3", "3"], ["2", "2"]]],
    ["text", "How much text to train on?", [["none", "none"], ["few", "a few rows"], ["plenty", "plenty"]]],
    ["memory", "Memory to train all weights?", [["enough", "enough"], ["short", "too little"]]],
  ];

  /** Numbers of the table's rows that an answer leads to, in their order; the last decides. */
  const advice = ({ model, runs, bits, text, memory }) => {
    if (model === "conv") return [0];
    const road = { small: [], fast: [1], inputs: [1, 2] }[runs];
    if (bits === "8") return [...road, 3];
    if (text !== "plenty") return [...road, 4];
    if (bits === "4") return [...road, 5];
    return [...road, 6, ...(memory === "short" ? [7] : [])];
  };

  const controls = new Map(QUESTIONS.map(([key, label, options]) => [key, moving.choice({
    label, options, value: state[key], change: (value) => { state[key] = value; update(); },
  })]));

  /** Text in which `code` is set as code. */
  const prose = (text) => text.split("`").map((part, i) => (i % 2 ? el("code", {}, part) : part));
  const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);
  const link = (number) => el("a", { href: chapters[number] }, `chapter ${Number(number)}`);

  const card = (index, last) => {
    const row = rows[index];
    const where = row.chapters.map(link).flatMap((a, i) => (i ? [", ", a] : [a]));
    return el("li", { class: last ? "last" : "" },
      el("p", { class: "mv-small" }, row.number ? `${row.number} · ${capital(row.case)}` : capital(row.case)),
      el("p", { class: "mv-advice" }, prose(capital(row.approach)), "."),
      el("p", {}, "Why: ", prose(row.why), "."),
      (evidence[row.number] ?? []).map((sentence) => el("p", { class: "mv-evidence" }, "Measured: ", sentence)),
      el("p", { class: "mv-where" }, "Told in ", where, "."));
  };

  const road = el("ol", { class: "mv-road", "aria-live": "polite", "aria-label": "Advice" });

  function update() {
    const found = advice(state), language = state.model === "language";
    controls.forEach((control, key) => { control.node.hidden = key !== "model" && !language; });
    controls.get("text").node.hidden ||= state.bits === "8";
    controls.get("memory").node.hidden ||= !["2", "3"].includes(state.bits) || state.text !== "plenty";
    road.replaceChildren(...found.map((index, i) => card(index, i === found.length - 1)));
  }
  update();
  return [el("div", { class: "mv-controls wide" }, [...controls.values()].map((c) => c.node)), road];
});
