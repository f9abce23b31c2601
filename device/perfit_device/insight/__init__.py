"""What a person sees of their shift: the values, and one page of HTML that needs nothing else.

`report` has plain values, `charts` draws them as SVG, and `page` puts both together. None of them asks a
cloud or opens a vault; `operations.insight` does.
"""
