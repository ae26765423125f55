"""One page about everything that was measured: a self-contained HTML file made of result files."""
