// The value under the pointer, on every line chart. Without scripts the charts are whole; only this is missing.
for (const svg of document.querySelectorAll("svg.chart")) {
  const numbers = (name) => svg.dataset[name].split(" ").map(Number);
  const [x, y, px, py] = ["x", "y", "px", "py"].map(numbers);
  const at = svg.querySelector(".at"), last = svg.parentElement.querySelector(".last");
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const here = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    let best = 0;
    for (let i = 1; i < px.length; i++) if (Math.abs(px[i] - here) < Math.abs(px[best] - here)) best = i;
    at.style.visibility = "visible";
    at.querySelector("line").setAttribute("x1", px[best]);
    at.querySelector("line").setAttribute("x2", px[best]);
    at.querySelector("circle").setAttribute("cx", px[best]);
    at.querySelector("circle").setAttribute("cy", py[best]);
    last.textContent = `${svg.dataset.name} ${Math.round(x[best])}: ${y[best]}`;
  });
  svg.addEventListener("pointerleave", () => {
    at.style.visibility = "hidden";
    last.textContent = last.dataset.last;
  });
}
