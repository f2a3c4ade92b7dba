"""Model families, one sub-package each: all that is known of a family lives in its folder."""
