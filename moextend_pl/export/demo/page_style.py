"""How the page looks, on wide screens and on phones, by day and by night."""

OLD, NEW = "74, 111, 165", "232, 113, 10"
SHADES = 10

_CELLS = "\n".join(
    f".mx-map .{letter}{shade} {{ background: rgba({colour}, {0.06 + 0.94 * shade / SHADES:.2f});"
    f" color: {'#fff' if shade > SHADES / 2 else 'inherit'}; }}"
    for letter, colour in (("o", OLD), ("n", NEW))
    for shade in range(SHADES + 1)
)

STYLE = f"""
.gradio-container {{ max-width: 1180px !important; margin: 0 auto !important; }}
footer {{ display: none !important; }}
.gradio-container .html-container {{ padding: 0 !important; }}
.mx-head h1 {{ margin: 4px 0 2px; font-size: 22px; font-weight: 650; overflow-wrap: anywhere; }}
.mx-head p {{ margin: 0; color: var(--body-text-color-subdued); font-size: 14px; }}
.mx-buttons {{ justify-content: flex-end; }}
.mx-buttons button {{ flex: 0 0 auto !important; min-width: 96px !important; }}
.mx-examples {{ contain: inline-size; }}
.mx-examples .gallery {{ flex-wrap: nowrap !important; overflow-x: auto !important; }}
.mx-examples .gallery-item {{ flex: 0 0 auto; max-width: 300px; }}
.mx-examples .gallery-item img {{ width: 56px !important; height: 56px !important; border-radius: 6px; }}
.mx-turn {{
  display: grid;
  grid-template-columns: minmax(0, 1fr) minmax(0, 1fr);
  gap: 12px 28px;
  margin: 0 0 16px;
  padding: 18px 22px;
  background: var(--block-background-fill);
  border: 1px solid var(--border-color-primary);
  border-radius: 12px;
}}
.mx-asked img {{
  max-height: 190px;
  max-width: 100%;
  min-height: 96px;
  margin: 0 8px 10px 0;
  border-radius: 8px;
  image-rendering: auto;
}}
.mx-asked p {{ margin: 0 0 10px; color: var(--body-text-color-subdued); font-size: 15px; overflow-wrap: anywhere; }}
.mx-answer {{
  min-height: 1.6em;
  margin: 0 0 18px;
  font-size: 20px;
  line-height: 1.4;
  white-space: pre-wrap;
  overflow-wrap: anywhere;
}}
.mx-going::after {{ content: "▍"; color: rgb({NEW}); animation: mx-blink 1s steps(2) infinite; }}
@keyframes mx-blink {{ 50% {{ opacity: 0; }} }}
.mx-problem {{ grid-column: 1 / -1; margin: 0; color: #c2410c; overflow-wrap: anywhere; }}
.dark .mx-problem {{ color: #fb923c; }}
.mx-others {{ margin: 0 0 10px; border-top: 1px solid var(--border-color-primary); }}
.mx-others dt {{ margin-top: 10px; color: var(--body-text-color-subdued); font-size: 13px; }}
.mx-others dd {{ margin: 0; font-size: 15px; white-space: pre-wrap; overflow-wrap: anywhere; }}
.mx-note {{ margin: 0; color: var(--body-text-color-subdued); font-size: 13px; line-height: 1.5; }}
.mx-note summary {{ cursor: pointer; }}
.mx-maps {{ display: flex; flex-direction: column; gap: 14px; }}
.mx-map {{ margin: 0; }}
.mx-map figcaption {{ margin-bottom: 5px; font-size: 14px; font-weight: 600; }}
.mx-map figcaption span {{ color: var(--body-text-color-subdued); font-weight: 400; }}
.mx-row {{
  display: grid;
  grid-template-columns: 22px repeat(var(--old), minmax(0, 1fr)) 8px repeat(var(--new), minmax(0, 1fr)) 42px;
  gap: clamp(0px, calc(60px / (var(--old) + var(--new)) - 1px), 1px);
  height: clamp(11px, calc(400px / var(--rows)), 26px);
  margin-bottom: 1px;
  font-size: clamp(8px, calc(300px / var(--rows)), 12px);
  line-height: 1;
}}
.mx-row > * {{ display: flex; align-items: center; justify-content: center; overflow: hidden; font-style: normal; }}
.mx-row i {{ border-radius: 2px; }}
.mx-row s {{ justify-content: flex-start; color: var(--body-text-color-subdued); text-decoration: none; }}
.mx-row b {{ justify-content: flex-end; color: rgb({NEW}); font-weight: 600; }}
.mx-old {{ color: rgb({OLD}); }}
.mx-new {{ color: rgb({NEW}); }}
{_CELLS}
@media (max-width: 760px) {{
  .mx-turn {{ grid-template-columns: minmax(0, 1fr); gap: 14px; padding: 14px; }}
}}
"""
