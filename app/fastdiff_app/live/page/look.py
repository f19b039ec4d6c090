"""How the page looks: one theme and a little CSS."""

from __future__ import annotations

import gradio as gr

THEME = gr.themes.Base(
    primary_hue=gr.themes.colors.orange,
    neutral_hue=gr.themes.colors.slate,
    radius_size=gr.themes.sizes.radius_lg,
    font=["system-ui", "-apple-system", "Segoe UI", "sans-serif"],
    font_mono=["ui-monospace", "Menlo", "monospace"],
).set(
    body_background_fill="#f6f7f9",
    body_background_fill_dark="#0d1017",
    # 4.5 to 1 and more against what is behind it, which the theme's own grey is not
    body_text_color_subdued="#566178",
    body_text_color_subdued_dark="#9aa7bc",
    block_label_text_color="#566178",
    block_label_text_color_dark="#9aa7bc",
    background_fill_secondary="#eceff4",
    background_fill_secondary_dark="#171c27",
    block_background_fill_dark="#131823",
    border_color_primary_dark="#262e3d",
    input_background_fill_dark="#0f141d",
    button_primary_background_fill="#e4572e",
    button_primary_background_fill_hover="#c9481f",
    button_primary_background_fill_dark="#e4572e",
    button_primary_text_color="#ffffff",
    color_accent="#e4572e",
    block_border_width="0px",
    block_shadow="none",
    block_radius="14px",
    input_radius="10px",
)
CSS = """
.gradio-container { max-width: 1180px !important; margin: 0 auto !important; width: 100% !important; }
.fd-head { display: flex; align-items: baseline; justify-content: space-between; gap: 16px; flex-wrap: wrap;
  padding: 6px 2px 2px; }
.fd-head h1 { font-size: 22px; font-weight: 700; letter-spacing: -.02em; margin: 0; line-height: 1.2; }
.fd-head span { color: var(--body-text-color-subdued); font-size: 13.5px; }
.fd-note { color: var(--body-text-color-subdued); font-size: 14px; }
.fd-go { align-self: flex-end; flex-grow: 0 !important; }
.grid-wrap { overflow-y: auto !important; }
footer { display: none !important; }
@media (max-width: 640px) {
  .gradio-container { padding: 0 12px !important; }
  .fd-head { gap: 2px 16px; }
}
.fd-fallback { width: 100%; border-radius: 14px; }
"""
