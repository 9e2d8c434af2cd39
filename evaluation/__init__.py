"""Numbers in, numbers and pictures out: metrics, protocols, statistics, figures and reports.

The way of a number, and the file that knows each step:

    metrics       measured and predicted (spots, genes) of one slide -> one value per gene, and what is undefined
    slide_scores  SlideResult: one slide -> every metric in one long table
    gene_lists    which genes PCC(H) and the top-50 HVG score look at, and what was used to pick them
    aggregation   genes -> slide -> patient -> fold, in the order of each protocol
    protocol      slides -> FoldScores; which number chooses the epoch (start reading here)
    fold_files    what a fold leaves on disk, written and read
    summary       folds of a run -> one summary with its biases named
    intervals     intervals and paired tests over patients
    predictions   the `.h5ad` of a slide
    external      an external test set: every fold, and the mean of their predictions
    comparison/   runs beside each other
    report/       tables, figures and the page of a run
"""

import utils  # noqa: F401  whoever runs a part of this room is told there what the programs are
