"""The pages to look at: one self-contained HTML file per scan, and the index of a cohort."""
