"""Attention of packed tokens of many sequences over pages of keys and values.

    pages = kernels.init_pages(num_pages, page_size, cache_spec(spec, "bfloat16"))
    pages = kernels.write_pages(pages, k, v, page_table, row_of_token, q_pos, page_size=16)
    out = kernels.paged_attention(
        q, pages, page_table, q_start, kv_len, q_pos, spec, page_size=16
    )

How keys and values lie in `pages` is the choice of a backend; every leaf has the pages first,
and empty pages are zeros.
`places` says where the key of a position lies, `reference` defines the operation.
"""
