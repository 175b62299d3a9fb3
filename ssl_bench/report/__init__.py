"""Results for people.

`grouping` puts runs into rows and boards. `tables` writes Markdown, `sweeps` the table of a sweep,
`page` report.html, which draws `curves` and what settings matter (`sensitivity`), `figure`
overview.png, `dashboard` the panels of W&B.
"""
