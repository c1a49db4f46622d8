"""The frame of the report page: style, and the script that moves the samples' slider. It may fetch nothing."""

from string import Template

PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>$title</title>
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<style>
body{font:15px/1.5 system-ui,sans-serif;margin:0 auto;max-width:1100px;padding:24px;color:#1f2937}
h1{font-size:24px;margin:0 0 4px}h2{font-size:18px;margin:32px 0 8px;border-bottom:1px solid #e5e7eb}
table{border-collapse:collapse;margin:8px 0}td,th{padding:3px 14px 3px 0;text-align:left;vertical-align:top}
th{color:#6b7280;font-weight:500}td.mono{font-family:ui-monospace,monospace;font-size:13px;word-break:break-all}
tr.differs td{background:#fef3c7}svg{width:100%;max-width:760px;height:auto;font-size:11px;fill:#6b7280}
svg polyline{stroke-width:1.6}svg .grid{stroke:#e5e7eb}.legend span{margin-right:14px;font-size:13px}
.legend i{display:inline-block;width:10px;height:10px;margin-right:5px;border-radius:2px}
.runs{display:flex;gap:32px;flex-wrap:wrap}.runs>div{flex:1;min-width:320px}
.samples{display:flex;gap:12px;flex-wrap:wrap}.samples figure{margin:0;max-width:320px}
.samples img{width:100%;image-rendering:auto;border-radius:4px;background:#f3f4f6}
figcaption{font-size:13px;color:#6b7280;overflow-wrap:anywhere}.none,.muted{color:#6b7280}
input[type=range]{width:min(480px,80%)}
</style></head><body>
$body
<script>
for (const slider of document.querySelectorAll("input[type=range]")) {
  const show = () => {
    const section = slider.closest("section");
    const step = section.dataset.steps.split(",")[slider.value];
    section.querySelector("output").textContent = "step " + step;
    for (const figure of section.querySelectorAll("figure")) {
      for (const picture of figure.querySelectorAll("img")) picture.hidden = picture.dataset.step !== step;
    }
  };
  slider.addEventListener("input", show);
  show();
}
</script>
</body></html>
""")
