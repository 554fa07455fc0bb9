"""Report: one page that shows what runs did."""
