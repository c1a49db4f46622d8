for (const section of document.querySelectorAll("section[data-steps]")) {
  const slider = section.querySelector("input");
  const steps = section.dataset.steps.split(",");
  const show = () => {
    const step = steps[slider.value];
    section.querySelector("output").textContent = "step " + step;
    for (const large of section.querySelectorAll(".large")) {
      const row = [...section.querySelectorAll(`.small[data-prompt="${large.dataset.prompt}"]`)];
      const small = row.find((other) => other.dataset.step === step);
      large.hidden = !small;
      if (small) { large.src = small.src; large.alt = small.alt; large.dataset.step = step; }
      for (const other of row) other.classList.toggle("now", other === small);
    }
  };
  slider.addEventListener("input", show);
  for (const small of section.querySelectorAll(".small")) {
    small.addEventListener("click", () => { slider.value = steps.indexOf(small.dataset.step); show(); });
  }
  show();
  for (const part of section.querySelectorAll(".scripted")) part.hidden = false;
}
