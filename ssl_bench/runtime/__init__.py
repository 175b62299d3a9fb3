"""The machine: `device`, `distributed` processes, `precision`, `memory`, `seeding`."""
