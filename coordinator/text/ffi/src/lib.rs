//! The C ABI of `lockstep_text.h`. This file only crosses the border: it turns
//! pointers into slices, results into owned C values, and panics into errors.
//! What is done lies in `tokenizer`, `pieces` and `template`.

mod guard;
mod pieces;
mod python;
mod template;
mod tokenizer;

use std::os::raw::c_char;

use guard::guarded;
use template::ChatTemplate;
use tokenizer::TextTokenizer;

#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    Ok = 0,
    Invalid = 1,
    Raised = 2,
    Limit = 3,
    Bug = 4,
}

/// Why a call failed; the message becomes one line.
#[derive(Debug)]
pub struct Failure {
    pub status: Status,
    pub message: String,
}

impl Failure {
    pub fn invalid(message: impl std::fmt::Display) -> Self {
        Failure {
            status: Status::Invalid,
            message: message.to_string(),
        }
    }
}

pub type Outcome<T> = Result<T, Failure>;

#[repr(C)]
pub struct LockstepText {
    data: *mut c_char,
    size: usize,
}

#[repr(C)]
pub struct LockstepIds {
    data: *mut u32,
    size: usize,
}

#[repr(C)]
pub struct LockstepTokenTable {
    bytes: *const u8,
    offsets: *const u32,
    special: *const u8,
    size: u32,
    replace_per_byte: u8,
}

impl LockstepText {
    const EMPTY: LockstepText = LockstepText {
        data: std::ptr::null_mut(),
        size: 0,
    };

    fn new(text: String) -> Self {
        if text.is_empty() {
            return Self::EMPTY;
        }
        let size = text.len();
        let data = Box::into_raw(text.into_bytes().into_boxed_slice()) as *mut c_char;
        LockstepText { data, size }
    }
}

impl LockstepIds {
    const EMPTY: LockstepIds = LockstepIds {
        data: std::ptr::null_mut(),
        size: 0,
    };

    fn new(ids: Vec<u32>) -> Self {
        if ids.is_empty() {
            return Self::EMPTY;
        }
        let size = ids.len();
        LockstepIds {
            data: Box::into_raw(ids.into_boxed_slice()) as *mut u32,
            size,
        }
    }
}

/// # Safety
/// `data` points to `size` readable values, or `size` is 0.
unsafe fn slice<'a, T>(data: *const T, size: usize) -> &'a [T] {
    if size == 0 || data.is_null() {
        &[]
    } else {
        std::slice::from_raw_parts(data, size)
    }
}

/// # Safety
/// As `slice`.
unsafe fn utf8<'a>(data: *const c_char, size: usize) -> Outcome<&'a str> {
    std::str::from_utf8(slice(data as *const u8, size))
        .map_err(|e| Failure::invalid(format!("not UTF-8 at byte {}", e.valid_up_to())))
}

/// Runs `work`, stores its value through `out`, or its failure through `error`.
///
/// # Safety
/// `out` is writable; `error` is writable or null.
unsafe fn deliver<T, C>(
    out: *mut C,
    error: *mut LockstepText,
    empty: C,
    wrap: impl FnOnce(T) -> C,
    work: impl FnOnce() -> Outcome<T>,
) -> Status {
    if !error.is_null() {
        error.write(LockstepText::EMPTY);
    }
    out.write(empty);
    match guarded(work) {
        Ok(value) => {
            out.write(wrap(value));
            Status::Ok
        }
        Err(failure) => {
            if !error.is_null() {
                let line = failure
                    .message
                    .split_whitespace()
                    .collect::<Vec<_>>()
                    .join(" ");
                error.write(LockstepText::new(line));
            }
            failure.status
        }
    }
}

/// # Safety
/// `handle` came from the matching `_new` and has not been freed.
unsafe fn borrow<'a, T>(handle: *const T) -> Outcome<&'a T> {
    handle
        .as_ref()
        .ok_or_else(|| Failure::invalid("null handle"))
}

unsafe fn release<T>(handle: *mut T) {
    if !handle.is_null() {
        // A destructor that panics must not unwind into C either.
        let _ = guarded(|| {
            drop(Box::from_raw(handle));
            Ok(())
        });
    }
}

#[no_mangle]
pub extern "C" fn lockstep_text_abi() -> u32 {
    1
}

/// # Safety
/// `text` came from this library and is freed once.
#[no_mangle]
pub unsafe extern "C" fn lockstep_text_free(text: LockstepText) {
    if !text.data.is_null() {
        drop(Box::from_raw(std::ptr::slice_from_raw_parts_mut(
            text.data as *mut u8,
            text.size,
        )));
    }
}

/// # Safety
/// `ids` came from this library and is freed once.
#[no_mangle]
pub unsafe extern "C" fn lockstep_ids_free(ids: LockstepIds) {
    if !ids.data.is_null() {
        drop(Box::from_raw(std::ptr::slice_from_raw_parts_mut(
            ids.data, ids.size,
        )));
    }
}

/// # Safety
/// See lockstep_text.h.
#[no_mangle]
pub unsafe extern "C" fn lockstep_tokenizer_new(
    json: *const c_char,
    json_size: usize,
    added: *const c_char,
    added_size: usize,
    out: *mut *mut TextTokenizer,
    error: *mut LockstepText,
) -> Status {
    let boxed = |t| Box::into_raw(Box::new(t));
    deliver(out, error, std::ptr::null_mut(), boxed, || {
        TextTokenizer::new(
            slice(json as *const u8, json_size),
            slice(added as *const u8, added_size),
        )
    })
}

/// # Safety
/// See lockstep_text.h.
#[no_mangle]
pub unsafe extern "C" fn lockstep_tokenizer_free(tokenizer: *mut TextTokenizer) {
    release(tokenizer);
}

/// # Safety
/// See lockstep_text.h.
#[no_mangle]
pub unsafe extern "C" fn lockstep_tokenizer_table(
    tokenizer: *const TextTokenizer,
    out: *mut LockstepTokenTable,
    error: *mut LockstepText,
) -> Status {
    let empty = LockstepTokenTable {
        bytes: std::ptr::null(),
        offsets: std::ptr::null(),
        special: std::ptr::null(),
        size: 0,
        replace_per_byte: 0,
    };
    let expose = |t: &pieces::TokenTable| LockstepTokenTable {
        bytes: t.bytes.as_ptr(),
        offsets: t.offsets.as_ptr(),
        special: t.special.as_ptr(),
        size: t.special.len() as u32,
        replace_per_byte: t.replace_per_byte as u8,
    };
    deliver(out, error, empty, expose, || Ok(borrow(tokenizer)?.table()))
}

/// # Safety
/// See lockstep_text.h.
#[no_mangle]
pub unsafe extern "C" fn lockstep_tokenizer_encode(
    tokenizer: *const TextTokenizer,
    text: *const c_char,
    text_size: usize,
    add_special_tokens: u8,
    out: *mut LockstepIds,
    error: *mut LockstepText,
) -> Status {
    deliver(out, error, LockstepIds::EMPTY, LockstepIds::new, || {
        borrow(tokenizer)?.encode(utf8(text, text_size)?, add_special_tokens != 0)
    })
}

/// # Safety
/// See lockstep_text.h.
#[no_mangle]
pub unsafe extern "C" fn lockstep_tokenizer_decode(
    tokenizer: *const TextTokenizer,
    ids: *const u32,
    num_ids: usize,
    skip_special_tokens: u8,
    out: *mut LockstepText,
    error: *mut LockstepText,
) -> Status {
    deliver(out, error, LockstepText::EMPTY, LockstepText::new, || {
        borrow(tokenizer)?.decode(slice(ids, num_ids), skip_special_tokens != 0)
    })
}

/// # Safety
/// See lockstep_text.h.
#[no_mangle]
pub unsafe extern "C" fn lockstep_tokenizer_token_to_id(
    tokenizer: *const TextTokenizer,
    token: *const c_char,
    token_size: usize,
    out: *mut u32,
) -> Status {
    deliver(
        out,
        std::ptr::null_mut(),
        0,
        |id| id,
        || {
            borrow(tokenizer)?
                .token_to_id(utf8(token, token_size)?)
                .ok_or_else(|| Failure::invalid("no such token"))
        },
    )
}

/// # Safety
/// See lockstep_text.h.
#[no_mangle]
pub unsafe extern "C" fn lockstep_template_new(
    source: *const c_char,
    source_size: usize,
    out: *mut *mut ChatTemplate,
    error: *mut LockstepText,
) -> Status {
    let boxed = |t| Box::into_raw(Box::new(t));
    deliver(out, error, std::ptr::null_mut(), boxed, || {
        ChatTemplate::new(utf8(source, source_size)?)
    })
}

/// # Safety
/// See lockstep_text.h.
#[no_mangle]
pub unsafe extern "C" fn lockstep_template_free(chat_template: *mut ChatTemplate) {
    release(chat_template);
}

/// # Safety
/// See lockstep_text.h.
#[no_mangle]
#[allow(clippy::too_many_arguments)]
pub unsafe extern "C" fn lockstep_template_render(
    chat_template: *const ChatTemplate,
    context: *const c_char,
    context_size: usize,
    unix_seconds: i64,
    max_steps: u64,
    max_output: usize,
    out: *mut LockstepText,
    error: *mut LockstepText,
) -> Status {
    let limits = template::Limits {
        max_steps,
        max_output,
    };
    deliver(out, error, LockstepText::EMPTY, LockstepText::new, || {
        borrow(chat_template)?.render(utf8(context, context_size)?, unix_seconds, limits)
    })
}
