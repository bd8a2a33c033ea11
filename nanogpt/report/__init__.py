"""HTML reports: one file each, no network, plots as inline SVG."""
