"""The frame of the report page: style, and the script that moves the samples' slider. It may fetch nothing."""

from string import Template

PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>$title</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<style>
:root{--ink:#1f2937;--soft:#6b7280;--line:#e5e7eb;--paper:#fff;--pale:#f3f4f6;--mark:#fef3c7;--accent:#2563eb}
@media (prefers-color-scheme:dark){:root{--ink:#e5e7eb;--soft:#9ca3af;--line:#374151;--paper:#111827;--pale:#1f2937;
--mark:#4d3b0a;--accent:#60a5fa}}
body{font:15px/1.5 system-ui,sans-serif;margin:0 auto;max-width:1100px;padding:24px;color:var(--ink);
background:var(--paper)}
h1{font-size:26px;margin:0 0 4px}h2{font-size:18px;margin:36px 0 10px;border-bottom:1px solid var(--line)}
h3{font-size:15px;margin:16px 0 4px}
table{border-collapse:collapse;margin:8px 0}td,th{padding:3px 16px 3px 0;text-align:left;vertical-align:top}
th{color:var(--soft);font-weight:500}td.mono{font-family:ui-monospace,monospace;font-size:13px;overflow-wrap:anywhere}
tr.differs td,tr.differs th{background:var(--mark)}
svg{width:100%;max-width:860px;height:auto;font-size:11px;fill:var(--soft)}
svg polyline{stroke-width:1.6}svg .grid{stroke:var(--line)}
.legend span{margin-right:14px;font-size:13px;white-space:nowrap;display:inline-block}
.legend i{display:inline-block;width:10px;height:10px;margin-right:5px;border-radius:2px}
.runs{display:flex;gap:32px;flex-wrap:wrap}.runs>div{flex:1;min-width:320px}
.bar{height:10px;margin-top:7px;border-radius:3px;background:var(--accent);min-width:1px}.bars td{white-space:nowrap}
.slider{display:flex;gap:14px;align-items:center;margin:8px 0 14px}input[type=range]{width:min(520px,70%)}
output{font-variant-numeric:tabular-nums;font-weight:600}
.samples{display:grid;gap:16px;grid-template-columns:repeat(auto-fill,minmax(220px,1fr))}
.samples figure{margin:0}.samples img{width:100%;border-radius:6px;background:var(--pale);image-rendering:auto}
.grid{overflow-x:auto}.grid img{width:96px;border-radius:4px;display:block;cursor:pointer}
.grid th:first-child{max-width:220px;font-size:13px}.grid .now{outline:3px solid var(--accent)}
.grid td{padding-right:6px}
figcaption{font-size:13px;color:var(--soft);overflow-wrap:anywhere}.none,.muted{color:var(--soft)}
summary{cursor:pointer;color:var(--soft);margin:8px 0}
</style></head><body>
$body
<script>
for (const section of document.querySelectorAll("section[data-steps]")) {
  const slider = section.querySelector("input[type=range]");
  const steps = section.dataset.steps.split(",");
  const show = () => {
    const step = steps[slider.value];
    section.querySelector("output").textContent = "step " + step;
    for (const large of section.querySelectorAll("img.large")) {
      const of_prompt = "img.small[data-prompt='" + large.dataset.prompt + "']";
      const small = section.querySelector(of_prompt + "[data-step='" + step + "']");
      large.hidden = !small;
      if (small) { large.src = small.src; large.dataset.step = step; }
      for (const other of section.querySelectorAll(of_prompt)) other.classList.toggle("now", other === small);
    }
  };
  slider.addEventListener("input", show);
  for (const small of section.querySelectorAll("img.small")) {
    small.addEventListener("click", () => { slider.value = steps.indexOf(small.dataset.step); show(); });
  }
  show();
}
</script>
</body></html>
""")
