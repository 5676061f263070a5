"""A subject's folder: photos, settings, runs and pictures, as the page (app.py) works on it; it knows no Gradio."""
