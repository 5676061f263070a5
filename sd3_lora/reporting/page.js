"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const css = (name) => `var(--${name})`;
  const gib = (value) => `${value.toFixed(2)} GiB`;
  const seconds = (value) => (value < 120 ? `${value.toFixed(1)} s` : `${(value / 60).toFixed(1)} min`);
  const last = Math.max(...data.losses.map((d) => d.step), ...data.warning.map((d) => d.step), 1);
  const byStep = { label: "step", labelAnchor: "right", labelOffset: 34, tickFormat: d3.format(","), domain: [0, last] };
  const steps = (width) => ({ ...byStep, ticks: Math.max(3, Math.round(width / 110)) });
  // Single steps far above the rest would press the curve flat.
  const top = (values) => {
    const sorted = Float64Array.from(values).sort();
    return [sorted[0], Math.min(sorted.at(-1), 2 * d3.quantileSorted(sorted, 0.98))];
  };
  const chart = (width, height, options) =>
    Plot.plot({ width, height, marginLeft: 48, marginRight: 14, marginBottom: 38, style: { background: "none", fontSize: "12px" }, ...options });
  const tip = (points, options) => Plot.tip(points, { ...options, lineHeight: 1.3 });
  const rule = (x) => Plot.ruleX(x === null ? [] : [x], { stroke: css("accent"), strokeOpacity: 0.5, strokeDasharray: "2 3" });

  const charts = {
    loss: (width, step) => {
      const domain = top(data.losses.map((d) => d.loss));
      const above = data.losses.filter((d) => d.loss > domain[1]).length;
      document.getElementById("above").textContent = above ? ` Dots above the chart: ${above}.` : "";
      return chart(width, width < 500 ? 240 : 300, {
        ariaLabel: "Loss by optimizer step", x: steps(width), y: { label: "loss", grid: true, domain, ticks: 5, nice: true },
        marks: [
          rule(step),
          Plot.dot(data.losses, { x: "step", y: "loss", r: data.losses.length < 300 ? 2.2 : 1.6, fill: css("dot"), fillOpacity: 0.7, clip: true }),
          Plot.lineY(data.losses, { x: "step", y: "smooth", stroke: css("accent"), strokeWidth: 2.25, clip: true }),
          tip(data.losses, Plot.pointerX({
            x: "step", y: "smooth",
            title: (d) => `step ${d.step}\nloss ${d.loss.toFixed(4)}\nsmoothed ${d.smooth.toFixed(4)}\nlearning rate ${d.rate.toPrecision(3)}`,
          })),
        ],
      });
    },
    levels: (width, step) => {
      const points = data.levels.flatMap((span) => span.losses.map((loss, level) => ({
        x: (span.first + span.last) / 2, loss, level, span,
      }))).filter((d) => d.loss !== null);
      const colour = (level) => css(`level-${level}`);
      return chart(width, width < 500 ? 220 : 260, {
        ariaLabel: "Loss by noise level", x: steps(width), y: { label: "loss", grid: true, ticks: 5, nice: true },
        marks: [
          rule(step),
          ...[0, 1, 2, 3].map((level) => Plot.lineY(points.filter((d) => d.level === level), {
            x: "x", y: "loss", stroke: colour(level), strokeWidth: 2, marker: "dot", curve: "monotone-x",
          })),
          tip(points, Plot.pointer({
            x: "x", y: "loss", title: (d) => `steps ${d.span.first} to ${d.span.last}\nnoise ${d.level / 4} to ${(d.level + 1) / 4}\nloss ${d.loss.toFixed(4)}`,
          })),
        ],
      });
    },
    subject: (width, step) => warning(width, step, "subject_loss", "accent"),
    class: (width, step) => warning(width, step, "class_loss", "script-0"),
    device: (width) => memory(width, "device_gib", true),
    host: (width) => memory(width, "host_gib", false),
    parts: (width) => parts(width),
  };

  function warning(width, step, name, colour) {
    const points = data.warning.filter((d) => d[name] !== null);
    const best = name === "subject_loss" ? [d3.least(points, (d) => d[name])] : [];
    return chart(width, 210, {
      ariaLabel: name === "subject_loss" ? "Loss of the subject at fixed noise" : "Drift of the class prompt",
      x: steps(width), y: { label: null, grid: true, ticks: 4, zero: name === "class_loss", insetBottom: best.length ? 24 : 0 }, marginTop: 10,
      marks: [
        rule(step),
        Plot.lineY(points, { x: "step", y: name, stroke: css(colour), strokeWidth: 2, marker: "dot" }),
        Plot.dot(best, { x: "step", y: name, r: 6, stroke: css(colour), strokeWidth: 1.5 }),
        Plot.text(best, { x: "step", y: name, text: (d) => `lowest, step ${d.step}`, dy: 15, fill: "currentColor", stroke: css("paper"), strokeWidth: 4, textAnchor: best[0] && best[0].step > 0.7 * points.at(-1).step ? "end" : "start" }),
        tip(points, Plot.pointerX({ x: "step", y: name, title: (d) => `step ${d.step}\n${d[name].toFixed(4)}` })),
      ],
    });
  }

  function memory(width, name, plans) {
    const drawn = data.spans.filter((span) => span.end > span.start);
    const colour = (script) => css(`script-${drawn.findIndex((span) => span.script === script)}`);
    const planned = plans ? drawn.filter((span) => span.planned_gib) : [];
    const budgets = plans ? drawn.filter((span) => span.budget_gib) : [];
    const tallest = d3.max([...data.bars.map((d) => d[name]), ...planned.map((d) => d.planned_gib), ...budgets.map((d) => d.budget_gib)]) || 1;
    const wide = data.bars.filter((d) => (d.end - d.start) * (width - 62) > 7 * d.name.length + 8);
    return chart(width, plans ? 230 : 170, {
      ariaLabel: plans ? "Peak GPU memory by stage" : "Peak host memory by stage",
      x: { axis: null, domain: [0, 1] }, y: { label: "GiB", grid: true, domain: [0, 1.12 * tallest], ticks: 4 }, marginBottom: 8,
      marks: [
        Plot.rect(data.bars, { x1: "start", x2: "end", y1: 0, y2: name, fill: (d) => colour(d.script), insetLeft: 0.5, insetRight: 0.5, rx: 1.5 }),
        Plot.text(wide, { x: (d) => (d.start + d.end) / 2, y: name, dy: 14, text: (d) => d.name, fill: css("paper"), filter: (d) => d[name] > 0.15 * tallest, clip: true }),
        Plot.link(planned, { x1: "start", x2: "end", y1: "planned_gib", y2: "planned_gib", stroke: css("plan"), strokeWidth: 2, strokeDasharray: "5 3" }),
        Plot.link(budgets, { x1: "start", x2: "end", y1: "budget_gib", y2: "budget_gib", stroke: css("faint"), strokeWidth: 1 }),
        Plot.ruleY([0]),
        tip(data.bars, Plot.pointerX({
          x: (d) => (d.start + d.end) / 2, y: name, maxRadius: Infinity,
          title: (d) => `${d.name}\n${d.script}\n${gib(d[name])}, ${seconds(d.elapsed_s)}`,
        })),
      ],
    });
  }

  function parts(width) {
    const span = data.spans.at(-1);
    const names = Object.keys(span.parts);
    const rows = names.map((part) => ({ row: "planned", part, size: span.parts[part] }));
    const measured = span.measured_gib ? [{ row: "measured", size: span.measured_gib }] : [];
    const colour = (part) => css(`part-${names.indexOf(part) % 8}`);
    let end = 0;
    for (const d of rows) { d.from = end; end += d.size; }
    const fits = rows.filter((d) => (d.size / end) * (width - 90) > 7 * d.part.length + 8);
    return chart(width, measured.length ? 112 : 74, {
      ariaLabel: "Planned memory by part", marginLeft: 72, marginTop: 6,
      x: { label: "GiB", domain: [0, 1.04 * Math.max(end, span.measured_gib || 0)], ticks: Math.max(3, Math.round(width / 120)) },
      y: { label: null, domain: ["planned", ...measured.map((d) => d.row)] },
      marks: [
        Plot.barX(rows, { x1: "from", x2: (d) => d.from + d.size, y: "row", fill: (d) => colour(d.part), insetRight: 1 }),
        Plot.text(fits, { x: (d) => d.from + d.size / 2, y: "row", text: "part", fill: css("paper") }),
        Plot.barX(measured, { x1: 0, x2: "size", y: "row", fill: css("faint") }),
        Plot.text(measured, { x: (d) => d.size / 2, y: "row", text: (d) => gib(d.size), fill: css("paper") }),
        tip(rows, Plot.pointer({ x: (d) => d.from + d.size / 2, y: "row", title: (d) => `${d.part}\n${gib(d.size)}`, maxRadius: 60 })),
      ],
    });
  }

  let shownStep = null;
  function draw() {
    for (const place of document.querySelectorAll("[data-chart]")) {
      const width = Math.round(place.clientWidth);
      if (width) place.replaceChildren(charts[place.dataset.chart](width, shownStep));
    }
  }
  draw();
  let drawnWidth = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth !== drawnWidth) { drawnWidth = innerWidth; requestAnimationFrame(draw); }
  });

  const slider = document.getElementById("step");
  if (slider) {
    const stops = slider.dataset.steps.split(" ").map(Number);
    const output = document.getElementById("step-shown");
    const line = document.getElementById("lora-of-step");
    const show = () => {
      const step = stops[slider.valueAsNumber];
      output.textContent = step;
      slider.setAttribute("aria-valuetext", `step ${step}`);
      for (const frame of document.querySelectorAll(".frame")) {
        let lacks = true;
        for (const picture of frame.querySelectorAll("img")) {
          picture.hidden = Number(picture.dataset.step) !== step;
          lacks = lacks && picture.hidden;
        }
        frame.querySelector(".lacks").hidden = !lacks;
      }
      const names = data.loras[step];
      line.textContent = names ? `The LoRA of this step: ${names.join(", ")}` : "";
      shownStep = step;
      for (const name of ["loss", "levels", "subject", "class"]) {
        const place = document.querySelector(`[data-chart=${name}]`);
        if (place && place.clientWidth) place.replaceChildren(charts[name](Math.round(place.clientWidth), step));
      }
    };
    slider.addEventListener("input", show);
    show();
  }
})();
