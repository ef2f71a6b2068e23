"""Which attention heads retrieve: probing by ablation, scores, rankings, selections and the head map."""
