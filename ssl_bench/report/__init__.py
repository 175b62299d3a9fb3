"""Results for people: `grouping` of runs, `tables`, `sweeps`, `charts` and `page` (report.html),
`figure` (overview.png), `dashboard` (W&B's).
"""
