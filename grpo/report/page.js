"use strict";
// The page reads without this; it only points at things: a step in every chart, a token in a completion.
(() => {
  addEventListener("beforeprint", () => { for (const one of document.querySelectorAll("details")) one.open = true; });
  const LEFT = 48, RIGHT = 352; // the plot's edges in grpo/report/charts.py
  const panels = [...document.querySelectorAll(".panel")].map((panel) => ({
    panel,
    apart: panel.classList.contains("apart"),
    svg: panel.querySelector("svg"),
    at: panel.querySelector(".at"),
    steps: panel.dataset.steps.split(" ").map(Number),
    outputs: [...panel.querySelectorAll("output")].map((out) => ({
      out, last: out.textContent, read: out.dataset.read.split("|"),
    })),
  }));
  const main = panels.filter((one) => one.steps.length > 1);
  const nearest = (steps, step) =>
    steps.reduce((best, each, i) => (Math.abs(each - step) < Math.abs(steps[best] - step) ? i : best), 0);
  const fellows = (source) => (source.apart ? [source] : main.filter((one) => !one.apart));

  function point(source, step) {
    for (const one of fellows(source)) {
      const i = nearest(one.steps, step);
      const first = one.steps[0], last = one.steps[one.steps.length - 1];
      const x = LEFT + ((one.steps[i] - first) / (last - first)) * (RIGHT - LEFT);
      one.at.setAttribute("x1", x);
      one.at.setAttribute("x2", x);
      one.panel.classList.add("pointed");
      for (const { out, read } of one.outputs) out.textContent = read[i];
      one.here = one.steps[i];
    }
  }
  function leave() {
    for (const one of main) {
      one.panel.classList.remove("pointed");
      for (const { out, last } of one.outputs) out.textContent = last;
    }
  }
  for (const one of main) {
    one.svg.setAttribute("tabindex", "0");
    one.svg.addEventListener("pointermove", (event) => {
      const box = one.svg.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * 360;
      const share = Math.min(1, Math.max(0, (x - LEFT) / (RIGHT - LEFT)));
      const first = one.steps[0], last = one.steps[one.steps.length - 1];
      point(one, first + share * (last - first));
    });
    one.svg.addEventListener("pointerleave", leave);
    one.svg.addEventListener("blur", leave);
    one.svg.addEventListener("keydown", (event) => {
      const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!way) return;
      event.preventDefault();
      const here = one.here === undefined ? one.steps.length - 1 : nearest(one.steps, one.here);
      point(one, one.steps[Math.min(one.steps.length - 1, Math.max(0, here + way))]);
    });
  }

  const told = document.getElementById("told");
  const FIELDS = ["token", "log-prob", "loss", "KL", "entropy", "ratio"]; // of grpo/report/samples.py
  function tell(event) {
    const token = event.target.closest(".said > i");
    const all = token && token.parentNode.dataset.told.split("|");
    const figures = all && all[[...token.parentNode.children].indexOf(token)];
    if (!figures) return;
    const parts = figures.split(" ").map((figure, i) => `${FIELDS[i]} ${figure}`);
    told.textContent = `“${token.textContent.replaceAll("\n", "↵")}”   ${parts.join("  ·  ")}`;
    told.hidden = false;
  }
  if (told) {
    for (const said of document.querySelectorAll(".said")) {
      said.addEventListener("pointerover", tell);
      said.addEventListener("click", tell);
      said.addEventListener("pointerleave", () => { told.hidden = true; });
    }
  }
})();
