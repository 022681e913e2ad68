//! `printf` and `assert` of device code.

use super::state::{Machine, Warp, lanes};
use super::{Fault, FaultKind};

/// Texts longer than this are cut; nobody prints them, and a wild pointer would otherwise print all of memory.
const MAX_TEXT: usize = 1 << 16;

impl Machine<'_> {
    /// A 64-bit parameter of a call, whose variable stands at a constant offset in local memory.
    fn parameter(&self, warp: &mut Warp, operand: u32, lane: u32) -> u64 {
        // SAFETY: the operand is a 64-bit constant with the variable's offset, which the decoder placed inside local memory.
        unsafe {
            let offset = warp.file.as_mut_ptr().add(operand as usize).cast::<u64>().read();
            let at = lane as usize * self.env.local_stride as usize + offset as usize;
            warp.local.as_mut_ptr().add(at).cast::<u64>().read_unaligned()
        }
    }

    /// The bytes of a text up to its zero.
    fn text(&mut self, warp: &mut Warp, address: u64, lane: u32, pc: u32) -> Result<Vec<u8>, Box<Fault>> {
        let mut text = vec![];
        while text.len() < MAX_TEXT {
            let at = self.readable(warp, address + text.len() as u64, lane, 1, pc)?;
            // SAFETY: `readable` has checked the byte.
            match unsafe { at.read() } {
                0 => break,
                byte => text.push(byte),
            }
        }
        Ok(text)
    }

    /// `vprintf(format, arguments)`
    pub(super) fn printf(&mut self, warp: &mut Warp, operands: &[u32], pc: u32, active: u32) -> Result<(), Box<Fault>> {
        for lane in lanes(active) {
            let format = self.parameter(warp, operands[1], lane);
            let arguments = self.parameter(warp, operands[2], lane);
            let format = self.text(warp, format, lane, pc)?;
            let (out, count) = self.format(warp, &format, arguments, lane, pc)?;
            self.block.output.extend(out);
            // SAFETY: the result's variable stands at a constant offset inside local memory.
            unsafe {
                let offset = warp.file.as_mut_ptr().add(operands[0] as usize).cast::<u64>().read();
                let at = lane as usize * self.env.local_stride as usize + offset as usize;
                warp.local.as_mut_ptr().add(at).cast::<u32>().write_unaligned(count);
            }
        }
        Ok(())
    }

    /// The text and the number of arguments used.
    fn format(
        &mut self,
        warp: &mut Warp,
        format: &[u8],
        mut arguments: u64,
        lane: u32,
        pc: u32,
    ) -> Result<(Vec<u8>, u32), Box<Fault>> {
        let mut out = vec![];
        let mut count = 0;
        let mut at = 0;
        while at < format.len() {
            if format[at] != b'%' {
                out.push(format[at]);
                at += 1;
                continue;
            }
            let mut spec = vec![b'%'];
            at += 1;
            let mut long = false;
            let mut conversion = 0;
            while let Some(&c) = format.get(at) {
                at += 1;
                match c {
                    b'-' | b'+' | b' ' | b'#' | b'0'..=b'9' | b'.' => spec.push(c),
                    b'*' => {
                        let width = self.argument(warp, &mut arguments, 4, lane, pc)? as i32;
                        spec.extend(width.to_string().bytes());
                        count += 1;
                    }
                    b'l' | b'j' | b'z' | b't' => long = true,
                    b'h' => spec.push(c),
                    _ => {
                        conversion = c;
                        break;
                    }
                }
            }
            match conversion {
                b'%' => {
                    out.push(b'%');
                    continue;
                }
                b'd' | b'i' | b'u' | b'x' | b'X' | b'o' | b'c' => {
                    let value = self.argument(warp, &mut arguments, if long { 8 } else { 4 }, lane, pc)?;
                    if long {
                        spec.extend(b"ll");
                    }
                    spec.extend([conversion, 0]);
                    // SAFETY: the format has one conversion, of an integer of this width.
                    out.extend(print(|to, size| unsafe {
                        if long {
                            libc::snprintf(to, size, spec.as_ptr().cast(), value)
                        } else {
                            libc::snprintf(to, size, spec.as_ptr().cast(), value as u32)
                        }
                    }));
                }
                b'f' | b'F' | b'e' | b'E' | b'g' | b'G' | b'a' | b'A' => {
                    let value = f64::from_bits(self.argument(warp, &mut arguments, 8, lane, pc)?);
                    spec.extend([conversion, 0]);
                    // SAFETY: the format has one conversion, of a double.
                    out.extend(print(|to, size| unsafe { libc::snprintf(to, size, spec.as_ptr().cast(), value) }));
                }
                b'p' => {
                    let value = self.argument(warp, &mut arguments, 8, lane, pc)?;
                    out.extend(format!("{value:#x}").bytes());
                }
                b's' => {
                    let address = self.argument(warp, &mut arguments, 8, lane, pc)?;
                    let mut text = self.text(warp, address, lane, pc)?;
                    text.push(0);
                    spec.extend(b"s\0");
                    // SAFETY: the format has one conversion, of a text that ends with a zero.
                    out.extend(print(|to, size| unsafe {
                        libc::snprintf(to, size, spec.as_ptr().cast(), text.as_ptr())
                    }));
                }
                _ => {
                    // As the device's printf: what is no conversion is printed as it stands.
                    out.extend(&spec);
                    if conversion != 0 {
                        out.push(conversion);
                    }
                    continue;
                }
            }
            count += 1;
        }
        Ok((out, count))
    }

    /// The next argument, aligned to its size.
    fn argument(
        &mut self,
        warp: &mut Warp,
        arguments: &mut u64,
        bytes: u32,
        lane: u32,
        pc: u32,
    ) -> Result<u64, Box<Fault>> {
        *arguments = arguments.next_multiple_of(u64::from(bytes));
        let at = self.readable(warp, *arguments, lane, bytes, pc)?;
        *arguments += u64::from(bytes);
        // SAFETY: `readable` has checked that many bytes.
        Ok(unsafe {
            if bytes == 8 { at.cast::<u64>().read_unaligned() } else { u64::from(at.cast::<u32>().read_unaligned()) }
        })
    }

    /// `__assertfail(message, file, line, function, size of a character)`
    pub(super) fn assert_fail(&mut self, warp: &mut Warp, operands: &[u32], pc: u32, active: u32) -> Box<Fault> {
        let lane = active.trailing_zeros() & 31;
        let mut texts = [vec![], vec![], vec![]];
        for (text, operand) in texts.iter_mut().zip([0, 1, 3]) {
            let address = self.parameter(warp, operands[operand], lane);
            match self.text(warp, address, lane, pc) {
                Ok(found) => *text = found,
                Err(fault) => return fault,
            }
        }
        let line = self.parameter(warp, operands[2], lane) as u32;
        let [message, file, function] = texts.map(|text| String::from_utf8_lossy(&text).into_owned());
        self.fault(
            FaultKind::Assert,
            warp,
            pc,
            lane,
            format!("{file}:{line}: {function}: assertion `{message}` failed"),
        )
    }
}

/// What a call of snprintf makes.
fn print(call: impl Fn(*mut libc::c_char, usize) -> libc::c_int) -> Vec<u8> {
    let mut buffer = vec![0u8; 128];
    let length = call(buffer.as_mut_ptr().cast(), buffer.len()).max(0) as usize;
    if length >= buffer.len() {
        buffer.resize(length + 1, 0);
        call(buffer.as_mut_ptr().cast(), buffer.len());
    }
    buffer.truncate(length);
    buffer
}
