"""Where an entry comes from, in forms that other programs read: statements, bills of materials, signatures.

| module | what it makes |
|---|---|
| sources | package URLs and digests of what an entry was made from |
| statement | in-toto Statement v1 with SLSA provenance v1, of an entry that was made here |
| bom | CycloneDX 1.6 with a machine-learning-model component, of any entry |
| reports | what was measured of an entry, as statements that hang on its manifest |
| hung | where they lie: on the entry's manifest in the image layout |
| signing | a DSSE envelope with an ed25519 signature, and what holds one against the files |

Statements and bills are pure functions of catalog entries: the same entries give the same text, on any machine. They
name files by SHA-256 and sources by commit; no path, no host and, but for the one place that SLSA has for it, no time.
"""
