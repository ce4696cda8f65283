"use strict";
// Optional: shows the values at a step in every chart's legend, and those of a token in a tooltip.
(() => {
  addEventListener("beforeprint", () => { for (const details of document.querySelectorAll("details")) details.open = true; });
  const LEFT = 48, RIGHT = 352; // the plot's edges in grpo/report/charts.py
  const panels = [...document.querySelectorAll(".panel")].map((panel) => ({
    panel,
    svg: panel.querySelector("svg"),
    at: panel.querySelector(".at"),
    steps: panel.dataset.steps.split(" ").map(Number),
    outputs: [...panel.querySelectorAll("output")].map((out) => ({
      out, last: out.textContent, read: out.dataset.read.split("|"),
    })),
  }));
  const charts = panels.filter((panel) => panel.steps.length > 1);
  const nearest = (steps, step) =>
    steps.reduce((best, each, i) => (Math.abs(each - step) < Math.abs(steps[best] - step) ? i : best), 0);

  function point(step) {
    for (const chart of charts) {
      const i = nearest(chart.steps, step);
      const first = chart.steps[0], last = chart.steps[chart.steps.length - 1];
      const x = LEFT + ((chart.steps[i] - first) / (last - first)) * (RIGHT - LEFT);
      chart.at.setAttribute("x1", x);
      chart.at.setAttribute("x2", x);
      chart.panel.classList.add("pointed");
      for (const { out, read } of chart.outputs) out.textContent = read[i];
      chart.here = chart.steps[i];
    }
  }
  function leave() {
    for (const chart of charts) {
      chart.panel.classList.remove("pointed");
      for (const { out, last } of chart.outputs) out.textContent = last;
    }
  }
  for (const chart of charts) {
    chart.svg.setAttribute("tabindex", "0");
    chart.svg.addEventListener("pointermove", (event) => {
      const box = chart.svg.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * 360;
      const share = Math.min(1, Math.max(0, (x - LEFT) / (RIGHT - LEFT)));
      const first = chart.steps[0], last = chart.steps[chart.steps.length - 1];
      point(first + share * (last - first));
    });
    chart.svg.addEventListener("pointerleave", leave);
    chart.svg.addEventListener("blur", leave);
    chart.svg.addEventListener("keydown", (event) => {
      const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!way) return;
      event.preventDefault();
      const here = chart.here === undefined ? chart.steps.length - 1 : nearest(chart.steps, chart.here);
      point(chart.steps[Math.min(chart.steps.length - 1, Math.max(0, here + way))]);
    });
  }

  const tooltip = document.getElementById("tooltip");
  const FIELDS = ["token", "log-prob", "loss", "KL", "entropy", "ratio"]; // of grpo/report/samples.py
  function show(event) {
    const token = event.target.closest(".completion > i");
    const all = token && token.parentNode.dataset.tooltips.split("|");
    const figures = all && all[[...token.parentNode.children].indexOf(token)];
    if (!figures) return;
    const parts = figures.split(" ").map((figure, i) => `${FIELDS[i]} ${figure}`);
    tooltip.textContent = `“${token.textContent.replaceAll("\n", "↵")}”   ${parts.join("  ·  ")}`;
    tooltip.hidden = false;
  }
  if (tooltip) {
    for (const text of document.querySelectorAll(".completion")) {
      text.addEventListener("pointerover", show);
      text.addEventListener("click", show);
      text.addEventListener("pointerleave", () => { tooltip.hidden = true; });
    }
  }
})();
