"""Tools of the authors: publish chapters and check that they keep the rules of the course.

publish        execute the notebooks and prepare them to be committed
lint           all rules of a chapter; lint_cells and lint_text hold them
chapter_parts  find chapters that lack a part

All of them work on the repository, not on an installed package.
"""
