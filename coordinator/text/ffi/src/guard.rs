//! Panics become errors, quietly: the message goes into the error instead of
//! to stderr. Panics outside of `guarded` are reported as ever.

use std::cell::{Cell, RefCell};
use std::panic::{catch_unwind, set_hook, take_hook, AssertUnwindSafe};
use std::sync::Once;

use crate::{Failure, Outcome, Status};

thread_local! {
    static DEPTH: Cell<u32> = const { Cell::new(0) };
    static MESSAGE: RefCell<String> = const { RefCell::new(String::new()) };
}

fn install_hook() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let outer = take_hook();
        set_hook(Box::new(move |info| {
            if DEPTH.with(Cell::get) == 0 {
                return outer(info);
            }
            MESSAGE.with(|m| *m.borrow_mut() = info.to_string());
        }));
    });
}

pub fn guarded<T>(work: impl FnOnce() -> Outcome<T>) -> Outcome<T> {
    install_hook();
    DEPTH.with(|d| d.set(d.get() + 1));
    // The handles are shared and immutable but for caches that survive a panic
    // (their locks are only ever tried), so nothing broken can be seen later.
    let result = catch_unwind(AssertUnwindSafe(work));
    DEPTH.with(|d| d.set(d.get() - 1));
    result.unwrap_or_else(|payload| {
        // A payload can be anything, and so can its destructor.
        let _ = catch_unwind(AssertUnwindSafe(|| drop(payload)));
        let message = MESSAGE.with(|m| std::mem::take(&mut *m.borrow_mut()));
        Err(Failure {
            status: Status::Bug,
            message: format!("the text library failed: {message}"),
        })
    })
}
