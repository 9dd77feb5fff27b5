// The same prompt, answered by SmolLM2 in fewer and fewer bits, from stored generations.

moving.figure("answers", ({ prompts, answers, tokens, calibration }) => {
  const { el, slider } = moving;
  const WORDS = { float: "floating point", nearest: "rounded to nearest", gptq: "rounded by GPTQ" };
  const widths = [...new Set(answers.map((a) => a.bits))].sort((a, b) => (b ?? 32) - (a ?? 32));
  const methods = [...new Set(answers.filter((a) => a.bits).map((a) => a.method))];
  const state = { prompt: 0, width: Math.max(widths.indexOf(4), 0), method: "nearest" };

  const find = (bits, method) => answers.find((a) => a.bits === bits && (!bits || a.method === method));
  const bits = () => widths[state.width];

  const prompt = moving.choice({
    label: "Prompt", value: 0, options: prompts.map((text, i) => [i, text]),
    change: (i) => { state.prompt = i; update(); },
  });
  prompt.node.classList.add("mv-tall");
  const width = slider({
    label: "Bits of a weight", min: 0, max: widths.length - 1, value: state.width,
    say: (i) => (widths[i] ? `${widths[i]} bits, groups of 32` : "floating point"),
    change: (i) => { state.width = i; update(); },
  });
  const method = moving.choice({
    label: "How it came to them", value: state.method, options: methods.map((m) => [m, WORDS[m] ?? m]),
    change: (m) => { state.method = m; update(); },
  });

  /** An answer whose words are marked from the first that the floating-point model did not say. */
  const marked = ([said, ended], reference) => {
    const words = said.split(/(\s+)/), other = reference.split(/(\s+)/);
    let same = 0;
    while (same < words.length && words[same] === other[same]) same += 1;
    const rest = words.slice(same).join("");
    return [words.slice(0, same).join(""), rest ? el("mark", {}, rest) : null,
            ended ? null : el("span", { class: "mv-cut", title: `cut off after ${tokens} tokens` }, " …")];
  };

  const heading = el("p", { class: "mv-small" });
  const answer = el("blockquote", { class: "mv-answer", "aria-live": "polite" });
  const original = el("blockquote", { class: "mv-answer faint" });
  const beside = el("div", {}, el("p", { class: "mv-small" }, "In floating point it had said"), original);

  function update() {
    const now = bits();
    const there = methods.filter((m) => !now || find(now, m));
    if (!there.includes(state.method)) { state.method = there[0]; method.set(there[0]); }
    method.allow(now ? there : []);
    method.node.hidden = methods.length < 2;
    const reference = find(null).said[state.prompt], found = find(now, state.method);
    heading.textContent = now ? `SmolLM2 in ${now} bits, ${WORDS[state.method] ?? state.method}` : "SmolLM2 in floating point";
    answer.replaceChildren(...marked(found.said[state.prompt], reference[0]).filter(Boolean));
    original.replaceChildren(...marked(reference, reference[0]).filter(Boolean));
    beside.hidden = !now;
  }
  update();

  return [prompt.node, el("div", { class: "mv-controls" }, width.node, method.node),
          el("div", {}, heading, answer), beside,
          el("p", { class: "mv-small" }, "Marked: from the first word on that differs from the floating-point answer. "
             + `Three dots: cut off after ${tokens} tokens.`
             + (methods.includes("gptq") ? ` GPTQ has read ${calibration.toLocaleString("en")} tokens.` : ""))];
});
