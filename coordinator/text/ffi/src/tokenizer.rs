//! A tokenizer.json, ready to use: immutable, shared by threads.

use serde::Deserialize;
use tokenizers::{AddedToken, Tokenizer};

use crate::pieces::TokenTable;
use crate::{Failure, Outcome};

pub struct TextTokenizer {
    inner: Tokenizer,
    table: TokenTable,
}

/// A token that tokenizer_config.json or special_tokens_map.json names.
#[derive(Deserialize)]
struct Added {
    content: String,
    #[serde(default)]
    special: bool,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    normalized: Option<bool>,
}

impl Added {
    fn token(&self) -> AddedToken {
        AddedToken::from(self.content.clone(), self.special)
            .single_word(self.single_word)
            .lstrip(self.lstrip)
            .rstrip(self.rstrip)
            .normalized(self.normalized.unwrap_or(!self.special))
    }
}

impl TextTokenizer {
    pub fn new(json: &[u8], added: &[u8]) -> Outcome<Self> {
        let mut inner = Tokenizer::from_bytes(json).map_err(Failure::invalid)?;
        // A prompt is never cut or padded behind the client's back.
        inner.with_truncation(None).map_err(Failure::invalid)?;
        inner.with_padding(None);
        let added: Vec<Added> = match added {
            [] => vec![],
            json => serde_json::from_slice(json)
                .map_err(|e| Failure::invalid(format!("added tokens: {e}")))?,
        };
        let known = inner.get_added_vocabulary().get_vocab();
        let missing: Vec<AddedToken> = added
            .iter()
            .filter(|t| !known.contains_key(&t.content))
            .map(Added::token)
            .collect();
        if !missing.is_empty() {
            inner.add_tokens(&missing);
        }
        let table = TokenTable::new(&inner)?;
        Ok(TextTokenizer { inner, table })
    }

    pub fn table(&self) -> &TokenTable {
        &self.table
    }

    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Outcome<Vec<u32>> {
        let encoding = self
            .inner
            .encode_fast(text, add_special_tokens)
            .map_err(Failure::invalid)?;
        Ok(encoding.get_ids().to_vec())
    }

    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Outcome<String> {
        self.inner
            .decode(ids, skip_special_tokens)
            .map_err(Failure::invalid)
    }

    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }
}
