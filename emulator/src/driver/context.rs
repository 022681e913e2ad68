//! Contexts: primary and other ones, the stack of each host thread, limits, profiler control.

use super::call::{Answer, exports, give, give_if_asked, refuse};
use super::codes::Code;
use super::graph;
use super::state::{
    self, Context, Handle, context_or_current, current, current_even_if_faulty, current_handle, driver, load,
};
use std::ffi::{c_int, c_uint, c_void};
use std::sync::Arc;
use std::sync::atomic::Ordering;

const FLAGS_MASK: c_uint = 0xff;

fn check_flags(flags: c_uint) -> Answer {
    match flags & !FLAGS_MASK {
        0 => Ok(()),
        _ => refuse(Code::INVALID_VALUE, format!("context flags {flags:#x} are not known")),
    }
}

fn create(flags: c_uint, device: c_int) -> Answer<Handle> {
    check_flags(flags)?;
    let context = state::create_context(device, flags)?;
    state::push_current(context.handle as Handle);
    Ok(context.handle as Handle)
}

fn destroy(handle: Handle) -> Answer {
    let context = driver()?.contexts.get(handle).or_else(|why| refuse(Code::INVALID_CONTEXT, why.message))?;
    if context.primary {
        return refuse(
            Code::INVALID_CONTEXT,
            "a primary context is released with cuDevicePrimaryCtxRelease, not destroyed",
        );
    }
    if current_handle() == handle {
        state::pop_current();
    }
    state::destroy_context(&context)
}

/// Drops one reference to a context; the last one destroys it.
fn detach(handle: Handle) -> Answer {
    let context = driver()?.contexts.get(handle).or_else(|why| refuse(Code::INVALID_CONTEXT, why.message))?;
    if current_handle() != handle {
        return refuse(Code::INVALID_CONTEXT, "a context is detached by a thread to which it is current");
    }
    if context.primary {
        return refuse(
            Code::INVALID_CONTEXT,
            "a primary context is released with cuDevicePrimaryCtxRelease, not detached",
        );
    }
    match context.attached.fetch_sub(1, Ordering::Relaxed) {
        1 => destroy(handle),
        _ => Ok(()),
    }
}

fn synchronize(context: &Context) -> Answer {
    graph::refuse_context_wait(context)?;
    graph::refuse_unsafe_call()?;
    super::stream::settle_all(context)?;
    super::order::host_waited_for_all(context)?;
    context.check()?;
    super::pool::trim_at_synchronisation(context.device()?);
    Ok(())
}

pub fn check_cache_config(config: c_int) -> Answer {
    match config {
        0..=3 => Ok(()),
        _ => refuse(Code::INVALID_VALUE, format!("the cache configuration must be 0 to 3, not {config}")),
    }
}

pub fn check_shared_config(config: c_int) -> Answer {
    match config {
        0..=2 => Ok(()),
        _ => refuse(Code::INVALID_VALUE, format!("the bank configuration must be 0 to 2, not {config}")),
    }
}

/// The limits and their defaults: stack, printf buffer, heap, two of device-side launches, L2 fetch, persisting L2.
const LIMITS: [usize; 7] = [1024, 1 << 20, 8 << 20, 2, 2048, 64, 0];

fn known_limit(limit: c_int) -> Answer<usize> {
    match usize::try_from(limit).ok().and_then(|at| LIMITS.get(at)) {
        Some(&first) => Ok(first),
        None => refuse(Code::UNSUPPORTED_LIMIT, format!("limit {limit} is not known")),
    }
}

fn primary_flags(device: c_int, flags: c_uint) -> Answer {
    check_flags(flags)?;
    let mut primary = state::device(device)?.primary.lock().unwrap();
    primary.flags = flags;
    if let Some(context) = &primary.context {
        context.flags.store(flags, Ordering::Relaxed);
    }
    Ok(())
}

exports! { CONTEXT:
    fn cuDevicePrimaryCtxRetain(context: *mut Handle, device: c_int) {
        if context.is_null() {
            return refuse(Code::INVALID_VALUE, "the pointer for the context is null");
        }
        give(context, state::retain_primary(device)?.handle as Handle, "the context")
    }

    fn cuDevicePrimaryCtxRelease(device: c_int) {
        state::release_primary(device)
    }

    fn cuDevicePrimaryCtxRelease_v2(device: c_int) {
        state::release_primary(device)
    }

    fn cuDevicePrimaryCtxReset(device: c_int) {
        state::reset_primary(device)
    }

    fn cuDevicePrimaryCtxReset_v2(device: c_int) {
        state::reset_primary(device)
    }

    fn cuDevicePrimaryCtxGetState(device: c_int, flags: *mut c_uint, active: *mut c_int) {
        let primary = state::device(device)?.primary.lock().unwrap();
        give(flags, primary.flags, "the flags")?;
        give(active, c_int::from(primary.context.is_some()), "the state")
    }

    fn cuDevicePrimaryCtxSetFlags(device: c_int, flags: c_uint) {
        primary_flags(device, flags)
    }

    fn cuDevicePrimaryCtxSetFlags_v2(device: c_int, flags: c_uint) {
        primary_flags(device, flags)
    }

    fn cuCtxCreate_v2(context: *mut Handle, flags: c_uint, device: c_int) {
        give(context, create(flags, device)?, "the context")
    }

    fn cuCtxCreate_v3(context: *mut Handle, affinity: *mut c_void, count: c_int, flags: c_uint, device: c_int) {
        let _ = affinity;
        if count != 0 {
            return refuse(Code::UNSUPPORTED_EXEC_AFFINITY, "execution affinity is not emulated");
        }
        give(context, create(flags, device)?, "the context")
    }

    fn cuCtxCreate_v4(context: *mut Handle, params: *mut c_void, flags: c_uint, device: c_int) {
        if !params.is_null() {
            return refuse(Code::NOT_SUPPORTED, "contexts for graphics or with execution affinity are not emulated");
        }
        give(context, create(flags, device)?, "the context")
    }

    fn cuCtxDestroy(context: Handle) {
        destroy(context)
    }

    fn cuCtxDestroy_v2(context: Handle) {
        destroy(context)
    }

    fn cuCtxAttach(context: *mut Handle, flags: c_uint) {
        if flags != 0 {
            return refuse(Code::INVALID_VALUE, format!("the flags must be 0, not {flags:#x}"));
        }
        let attached = current_even_if_faulty()?;
        give(context, attached.handle as Handle, "the context")?;
        attached.attached.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn cuCtxDetach(context: Handle) {
        detach(context)
    }

    fn cuCtxGetCurrent(context: *mut Handle) {
        driver()?;
        give(context, current_handle(), "the context")
    }

    fn cuCtxSetCurrent(context: Handle) {
        if !context.is_null() {
            driver()?.contexts.get(context).or_else(|why| refuse(Code::INVALID_CONTEXT, why.message))?;
        }
        driver()?;
        state::set_current(context);
        Ok(())
    }

    fn cuCtxPushCurrent_v2(context: Handle) {
        driver()?.contexts.get(context).or_else(|why| refuse(Code::INVALID_CONTEXT, why.message))?;
        state::push_current(context);
        Ok(())
    }

    fn cuCtxPopCurrent_v2(context: *mut Handle) {
        driver()?;
        if current_handle().is_null() {
            return refuse(Code::INVALID_CONTEXT, "this thread has no current context");
        }
        give_if_asked(context, state::pop_current());
        Ok(())
    }

    fn cuCtxGetDevice(device: *mut c_int) {
        give(device, current_even_if_faulty()?.device, "the device")
    }

    fn cuCtxGetDevice_v2(device: *mut c_int, context: Handle) {
        give(device, context_or_current(context)?.device, "the device")
    }

    fn cuCtxGetFlags(flags: *mut c_uint) {
        give(flags, load(&current_even_if_faulty()?.flags), "the flags")
    }

    fn cuCtxSetFlags(flags: c_uint) {
        check_flags(flags)?;
        current()?.flags.store(flags, Ordering::Relaxed);
        Ok(())
    }

    fn cuCtxGetId(context: Handle, id: *mut u64) {
        give(id, context_or_current(context)?.handle as u64, "the id")
    }

    fn cuCtxGetApiVersion(context: Handle, version: *mut c_uint) {
        context_or_current(context)?;
        give(version, super::device::DRIVER_VERSION as c_uint, "the version")
    }

    fn cuCtxSynchronize() {
        synchronize(&*current()?)
    }

    fn cuCtxSynchronize_v2(context: Handle) {
        let context: Arc<Context> = context_or_current(context)?;
        context.check()?;
        synchronize(&context)
    }

    fn cuCtxGetLimit(value: *mut usize, limit: c_int) {
        let first = known_limit(limit)?;
        let context = current()?;
        let now = context.limits.lock().unwrap().get(&limit).copied().unwrap_or(first);
        give(value, now, "the limit")
    }

    fn cuCtxSetLimit(limit: c_int, value: usize) {
        known_limit(limit)?;
        current()?.limits.lock().unwrap().insert(limit, value);
        Ok(())
    }

    fn cuCtxResetPersistingL2Cache() {
        current().map(|_| ())
    }

    fn cuCtxGetCacheConfig(config: *mut c_int) {
        give(config, load(&current()?.cache_config) as c_int, "the configuration")
    }

    fn cuCtxSetCacheConfig(config: c_int) {
        check_cache_config(config)?;
        current()?.cache_config.store(config as u32, Ordering::Relaxed);
        Ok(())
    }

    fn cuCtxGetSharedMemConfig(config: *mut c_int) {
        const FOUR_BYTE_BANKS: c_int = 1;
        current()?;
        give(config, FOUR_BYTE_BANKS, "the configuration")
    }

    fn cuCtxSetSharedMemConfig(config: c_int) {
        current()?;
        check_shared_config(config)
    }

    fn cuProfilerStart() {
        current().map(|_| ())
    }

    fn cuProfilerStop() {
        current()?;
        super::profile::write(driver()?);
        Ok(())
    }
}
