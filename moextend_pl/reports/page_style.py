"""How the page of a run looks."""

STYLE = """
:root { --ink: #1d2733; --soft: #667; --line: #e3e6ea; --paper: #fff; --wash: #f6f7f9; --new: #e8710a; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: var(--wash); font: 15px/1.5 system-ui, sans-serif; }
header {
  position: sticky;
  top: 0;
  z-index: 1;
  padding: 10px 28px;
  background: var(--paper);
  border-bottom: 1px solid var(--line);
}
h1 { display: inline; margin: 0 24px 0 0; font-size: 20px; }
nav { display: inline; }
nav a { margin-right: 14px; color: var(--soft); text-decoration: none; }
nav a:hover { color: var(--new); }
main { max-width: 1080px; margin: 0 auto; padding: 8px 20px 60px; }
section {
  margin: 20px 0;
  padding: 8px 28px 24px;
  background: var(--paper);
  border: 1px solid var(--line);
  border-radius: 10px;
  scroll-margin-top: 60px;
}
h2 { font-size: 22px; }
h3 { margin: 30px 0 8px; font-size: 16px; }
.tiles { display: flex; flex-wrap: wrap; gap: 10px; }
.tiles div { min-width: 130px; padding: 10px 14px; background: var(--wash); border-radius: 8px; }
.tiles b { display: block; font-size: 18px; font-weight: 600; }
.tiles span { color: var(--soft); font-size: 13px; }
figure { margin: 6px 0; overflow-x: auto; }
figure svg, figure img { max-width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: 13px; }
table { width: 100%; border-collapse: collapse; font-size: 14px; }
th, td {
  padding: 5px 10px 5px 0;
  text-align: left;
  vertical-align: top;
  border-bottom: 1px solid var(--line);
  overflow-wrap: anywhere;
}
th { color: var(--soft); font-weight: 500; }
details { margin-top: 26px; }
summary { cursor: pointer; color: var(--soft); }
"""
